"""
The JSON that travels over HTTP, as Pydantic models; the API and the SDK share them.

Only shapes and the rules a document can break by itself live here. What needs the database
or a handler's schema is `api/submissions`; how bytes become these models is `api/jsontext`.

Times are RFC 3339: any offset is taken in, UTC with `Z` and microseconds is given out.
Durations are seconds, as their names say.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, get_args
from uuid import UUID

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from asyncflow.domain.policy import (
    DELAY_SECONDS_MAX,
    MAX_ATTEMPTS_BOUND,
    NAME_PATTERN,
    PRIORITY_DEFAULT,
    PRIORITY_HIGHEST,
    PRIORITY_LOWEST,
    TIMEOUT_SECONDS_MAX,
    TIMEOUT_SECONDS_MIN,
)

BATCH_SIZE_MAX = 1_000
PAGE_SIZE_MAX, PAGE_SIZE_DEFAULT = 500, 50
CURSOR_PATTERN = "^[A-Za-z0-9_-]{22}$"

Status = Literal[
    "PENDING", "SCHEDULED", "RETRYING", "QUEUED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"
]
"""What people call a task's condition; see `domain.states`."""

STATUSES: tuple[str, ...] = get_args(Status)

_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII
)


def rfc3339(time: datetime) -> str:
    """
    `time` in UTC with microseconds, ending in `Z`.
    """
    return time.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


_FIRST = datetime.min.replace(tzinfo=UTC) + timedelta(microseconds=1)
_LAST = datetime.max.replace(tzinfo=UTC) - timedelta(microseconds=1)


def _instant(value: object) -> datetime:
    try:
        if isinstance(value, str) and _RFC_3339.fullmatch(value):
            value = datetime.fromisoformat(value.upper())
        if isinstance(value, datetime) and value.tzinfo is not None:
            # The first and the last moment of the calendar, which is how some languages say
            # "never", would reach PostgreSQL as infinities and come back without a time zone.
            return min(max(value.astimezone(UTC), _FIRST), _LAST)
    except (ValueError, OverflowError):
        # The 30th of February, or a time that leaves the calendar on its way to UTC.
        pass
    raise ValueError(
        "must be an RFC 3339 time with its offset, such as 2030-01-31T09:30:00Z "
        "or 2030-01-31T10:30:00+01:00"
    )


def _in_capitals(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


Name = Annotated[
    str,
    Field(
        pattern=f"^{NAME_PATTERN.pattern}$",
        description="1 to 128 of A-Z a-z 0-9 . _ -",
        examples=["sample-task"],
    ),
]
Instant = Annotated[
    datetime,
    BeforeValidator(_instant),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
Timestamp = Annotated[
    datetime,
    PlainSerializer(rfc3339, return_type=str, when_used="json"),
    WithJsonSchema(
        {"type": "string", "format": "date-time", "examples": ["2030-01-31T09:30:00.000000Z"]}
    ),
]


class SubmitTask(BaseModel):
    """
    A task to run once, by the handler of its name.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"name": "sample-task", "payload": {"seconds": 5}}]},
    )

    name: Name = Field(description="Which handler runs it: 1 to 128 of A-Z a-z 0-9 . _ -")
    payload: dict[str, Any] = Field(
        default_factory=dict,
        description="What the handler gets: a JSON object. Integers must fit 64 bits, other "
        "numbers are kept as IEEE doubles.",
    )
    queue: Name | None = Field(
        default=None, description="Where it waits; the handler's own queue if left out."
    )
    priority: int = Field(
        default=PRIORITY_DEFAULT,
        ge=PRIORITY_LOWEST,
        le=PRIORITY_HIGHEST,
        description="Higher goes first.",
    )
    run_at: Instant | None = Field(
        default=None, description="Never starts before; at once if left out or past."
    )
    delay_seconds: float | None = Field(
        default=None,
        ge=0,
        le=DELAY_SECONDS_MAX,
        description="Never starts before this much later, by the database's clock; instead of "
        "`run_at`.",
    )
    max_attempts: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ATTEMPTS_BOUND,
        description="How many failed attempts end it; as the handler says if left out.",
    )
    timeout_seconds: float | None = Field(
        default=None,
        ge=TIMEOUT_SECONDS_MIN,
        le=TIMEOUT_SECONDS_MAX,
        description="How long one attempt may take; as the handler says if left out.",
    )
    expires_at: Instant | None = Field(
        default=None,
        description="Cancelled if no attempt has begun by then; in the future and after "
        "`run_at`. Never expires if left out.",
    )

    @field_validator("delay_seconds")
    @classmethod
    def _is_the_only_start(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("run_at") is not None:
            raise ValueError("cannot go together with `run_at`; give one of the two")
        return value

    @field_validator("expires_at")
    @classmethod
    def _is_after_the_start(cls, value: datetime | None, info: ValidationInfo) -> datetime | None:
        run_at = info.data.get("run_at")
        if value is not None and run_at is not None and value <= run_at:
            raise ValueError("must be later than `run_at`, or the task could never run")
        return value


class SubmitBatch(BaseModel):
    """
    Tasks to submit together: all of them are stored, or none, unless it is `partial`.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    tasks: list[SubmitTask] = Field(min_length=1, max_length=BATCH_SIZE_MAX)
    partial: bool = Field(
        default=False,
        description="Store the tasks that can be stored, together, and tell what is wrong with the "
        "others. Without it one wrong task refuses the batch.",
    )


class TaskQuery(BaseModel):
    """
    Which tasks to list.
    """

    model_config = ConfigDict(extra="forbid")

    status: list[Annotated[Status, BeforeValidator(_in_capitals)]] = Field(
        default=[], description="Upper or lower case; give it several times for any of several."
    )
    name: Name | None = None
    queue: Name | None = None
    cursor: str | None = Field(
        default=None,
        pattern=CURSOR_PATTERN,
        description="The `next_cursor` of the page before.",
    )
    limit: int = Field(default=PAGE_SIZE_DEFAULT, ge=1, le=PAGE_SIZE_MAX)


class SubmittedTask(BaseModel):
    """
    A task that is stored: it survives any crash from here on.
    """

    id: UUID
    name: str
    status: Status = Field(description="`PENDING`, or `SCHEDULED` if it is due later.")
    queue: str
    priority: int
    created_at: Timestamp
    run_at: Timestamp
    expires_at: Timestamp | None


class RefusedTask(BaseModel):
    """
    A task of a `partial` batch that was not stored.
    """

    index: int = Field(description="Its place in the batch, from 0.")
    problem: Problem


class SubmittedBatch(BaseModel):
    """
    The tasks of a batch, in the order they were submitted.
    """

    tasks: list[SubmittedTask | None] = Field(
        description="Null in the place of a task that was refused, which only happens to a "
        "`partial` batch."
    )
    refused: list[RefusedTask] = Field(description="What was wrong, in the same order.")


class TaskError(BaseModel):
    """
    Why an attempt did not complete.
    """

    kind: str = Field(description="A stable word, such as an exception's qualified name.")
    message: str
    traceback: str | None = Field(default=None, description="The handler's; not in lists.")


class TaskProgress(BaseModel):
    """
    How far a running attempt has come, in the handler's own judgement.
    """

    fraction: float | None = Field(default=None, description="0 to 1.")
    message: str | None = None


class Timings(BaseModel):
    """
    How long the latest attempt took to start and to run. None means not known yet.
    """

    wait_seconds: float | None = Field(description="From being due to its start.")
    run_seconds: float | None = Field(description="From its start to its end.")
    total_seconds: float | None = Field(description="From submission to the task's end.")


class AttemptView(BaseModel):
    """
    One execution of a task.
    """

    attempt: int
    generation: int
    outcome: Literal["RUNNING", "COMPLETED", "FAILED", "CANCELLED", "RETRIED", "RELEASED"]
    started_at: Timestamp
    finished_at: Timestamp | None
    duration_seconds: float | None
    worker_id: UUID | None
    error: TaskError | None


class TaskSummary(BaseModel):
    """
    A task as lists show it.
    """

    id: UUID
    name: str
    status: Status
    queue: str
    priority: int
    generation: int = Field(description="1, and one more for each redrive.")
    attempt: int = Field(description="Attempts begun so far, over all generations.")
    failures: int = Field(description="Failed attempts of this generation.")
    max_attempts: int | None = Field(description="None: as the handler says.")
    timeout_seconds: float | None = Field(description="None: as the handler says.")
    created_at: Timestamp
    run_at: Timestamp
    expires_at: Timestamp | None
    queued_at: Timestamp | None
    started_at: Timestamp | None
    finished_at: Timestamp | None
    cancel_requested_at: Timestamp | None
    worker_id: UUID | None
    progress: TaskProgress | None
    error: TaskError | None = Field(description="Of the latest attempt that failed.")
    timings: Timings


class TaskView(TaskSummary):
    """
    Everything about one task.
    """

    waiting_for: str | None = Field(
        description="Why a due task does not start, or a running one does not end, if that will "
        "not pass by itself."
    )
    attempts: list[AttemptView] = Field(description="Oldest first.")
    payload: dict[str, Any]
    result: Any = Field(description="What the handler returned; null until completed.")


class TaskPage(BaseModel):
    """
    Part of a list, newest first.
    """

    tasks: list[TaskSummary]
    next_cursor: str | None = Field(description="Null on the last page.")


class ProblemError(BaseModel):
    """
    One wrong place in a request: in its body, or among its query parameters.
    """

    pointer: str | None = Field(
        default=None, description="JSON pointer (RFC 6901) into the body; '' is all of it."
    )
    parameter: str | None = Field(default=None, description="Name of a query parameter.")
    detail: str = Field(description="What is wrong, and what would have worked.")


class Problem(BaseModel):
    """
    Why a request was refused (RFC 9457).
    """

    type: str = Field(examples=["/problems/invalid-task"])
    title: str
    status: int
    detail: str
    instance: str | None = Field(
        default=None,
        description="The path that was asked for; absent if the request could not be read.",
    )
    errors: list[ProblemError] | None = Field(default=None, description="Every wrong place.")
    state: str | None = Field(default=None, description="With 409: the task's status.")
    incident_id: str | None = Field(default=None, description="With 500: as in our logs.")


class Live(BaseModel):
    """
    The process answers.
    """

    status: Literal["live"] = "live"


class Ready(BaseModel):
    """
    The process can take tasks.
    """

    status: Literal["ready", "degraded"] = Field(
        description="`degraded`: tasks are accepted, but something keeps them from running."
    )
    schema_version: str
    broker: str = Field(
        description="The state of RabbitMQ as this process and the relay see it, or `not used`. "
        "Tasks are accepted whatever it is."
    )
    maintenance: str = Field(
        description="`running`, or since when no maintenance process has been. Tasks are accepted "
        "whatever it is."
    )
