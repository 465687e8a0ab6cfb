"""
A task, its attempts, and lists of tasks.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from asyncflow.wire.fields import Name, Status, Timestamp

PAGE_SIZE_MAX, PAGE_SIZE_DEFAULT = 500, 50
CURSOR_PATTERN = "^[A-Za-z0-9_-]{22}$"


def _in_capitals(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


class TaskQuery(BaseModel):
    """
    The tasks to list.
    """

    model_config = ConfigDict(extra="forbid")

    status: list[Annotated[Status, BeforeValidator(_in_capitals)]] = Field(
        default=[], description="Case-insensitive. Repeat it to match any of several statuses."
    )
    name: Name | None = Field(default=None, description="Only tasks with this name.")
    queue: Name | None = Field(default=None, description="Only tasks in this queue.")
    cursor: str | None = Field(
        default=None,
        pattern=CURSOR_PATTERN,
        description="Continue from this cursor, the `next_cursor` of the previous page.",
    )
    limit: int = Field(
        default=PAGE_SIZE_DEFAULT,
        ge=1,
        le=PAGE_SIZE_MAX,
        description="Maximum number of tasks.",
    )


class TaskError(BaseModel):
    """
    Why an attempt did not complete.
    """

    kind: str = Field(description="A stable identifier, such as an exception's qualified name.")
    message: str
    traceback: str | None = Field(
        default=None, description="The handler's traceback; omitted from lists."
    )


class TaskProgress(BaseModel):
    """
    The progress of a running attempt, as the handler reports it.
    """

    fraction: float | None = Field(default=None, description="Between 0 and 1.")
    message: str | None = None


class Timings(BaseModel):
    """
    How long the latest attempt took to start and to run. Null means not known yet.
    """

    wait_seconds: float | None = Field(description="From due to started.")
    run_seconds: float | None = Field(description="From started to finished.")
    total_seconds: float | None = Field(description="From submitted to finished.")


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
    A task, as shown in lists.
    """

    id: UUID
    name: str
    status: Status
    queue: str
    priority: int
    generation: int = Field(description="Starts at 1; each redrive adds one.")
    attempt: int = Field(description="Attempts started so far, across all generations.")
    failures: int = Field(description="Failed attempts in this generation.")
    max_attempts: int | None = Field(description="Null means the handler's setting.")
    timeout_seconds: float | None = Field(description="Null means the handler's setting.")
    created_at: Timestamp
    run_at: Timestamp
    expires_at: Timestamp | None
    queued_at: Timestamp | None
    started_at: Timestamp | None
    finished_at: Timestamp | None
    cancel_requested_at: Timestamp | None
    worker_id: UUID | None
    progress: TaskProgress | None
    error: TaskError | None = Field(description="The error of the latest failed attempt.")
    timings: Timings


class TaskView(TaskSummary):
    """
    Everything about one task.
    """

    waiting_for: str | None = Field(
        description="Why a due task does not start, or a running one does not end, if that needs "
        "someone to act."
    )
    attempts: list[AttemptView] = Field(description="Oldest first.")
    payload: dict[str, Any]
    result: Any = Field(description="The handler's return value; null until completed.")


class TaskPage(BaseModel):
    """
    One page of a list, newest first.
    """

    tasks: list[TaskSummary]
    next_cursor: str | None = Field(description="Null on the last page.")
