"""
A task to run, and the answer once it is stored.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from asyncflow.domain.policy import (
    DELAY_SECONDS_MAX,
    MAX_ATTEMPTS_BOUND,
    PRIORITY_DEFAULT,
    PRIORITY_HIGHEST,
    PRIORITY_LOWEST,
    TIMEOUT_SECONDS_MAX,
    TIMEOUT_SECONDS_MIN,
)
from asyncflow.wire.fields import Instant, Name, Status, Timestamp


class SubmitTask(BaseModel):
    """
    A task to run once, by the handler registered under its name.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"name": "sample-task", "payload": {"seconds": 5}}]},
    )

    name: Name = Field(description="The handler to run: 1-128 characters from [A-Za-z0-9._-].")
    payload: dict[str, Any] = Field(
        default_factory=dict,
        description="The handler's input, a JSON object. Integers must fit in 64 bits; other "
        "numbers are stored as IEEE 754 doubles.",
    )
    queue: Name | None = Field(
        default=None, description="The queue to wait in. Default: the handler's queue."
    )
    priority: int = Field(
        default=PRIORITY_DEFAULT,
        ge=PRIORITY_LOWEST,
        le=PRIORITY_HIGHEST,
        description="Higher runs first.",
    )
    run_at: Instant | None = Field(
        default=None, description="The earliest start. Default: now; a time in the past means now."
    )
    delay_seconds: float | None = Field(
        default=None,
        ge=0,
        le=DELAY_SECONDS_MAX,
        description="Seconds from now to the earliest start, by the database's clock. "
        "Mutually exclusive with `run_at`.",
    )
    max_attempts: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ATTEMPTS_BOUND,
        description="The task fails after this many failed attempts. "
        "Default: the handler's setting.",
    )
    timeout_seconds: float | None = Field(
        default=None,
        ge=TIMEOUT_SECONDS_MIN,
        le=TIMEOUT_SECONDS_MAX,
        description="Time limit of one attempt. Default: the handler's setting.",
    )
    expires_at: Instant | None = Field(
        default=None,
        description="The task is cancelled if no attempt has started by then. Must be in the "
        "future and later than `run_at`. Default: never.",
    )

    @field_validator("delay_seconds")
    @classmethod
    def _excludes_run_at(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("run_at") is not None:
            raise ValueError("cannot be combined with `run_at`; send one of the two")
        return value

    @field_validator("expires_at")
    @classmethod
    def _is_after_run_at(cls, value: datetime | None, info: ValidationInfo) -> datetime | None:
        run_at = info.data.get("run_at")
        if value is not None and run_at is not None and value <= run_at:
            raise ValueError("must be later than `run_at`")
        return value


class SubmittedTask(BaseModel):
    """
    A stored task. From now on it survives any crash.
    """

    id: UUID
    name: str
    status: Status = Field(description="`PENDING`, or `SCHEDULED` if it is due later.")
    queue: str
    priority: int
    created_at: Timestamp
    run_at: Timestamp
    expires_at: Timestamp | None
