"""
A task: as it is submitted, as it is stored, and as a worker claims it. A task's columns are
declared here, once.

The fields of `NewTask` are inserted; those of `Task` are read back and shown; those of `Claim` go
to the worker, and to the handler by its `Context`. SQL, JSON and the command line derive from these
three (`store.columns`, `api.views`), so a new column is a migration and a line in each of the three
that is to carry it.

The id is a UUIDv7 (RFC 9562 §5.7), so that ids sort by submission and inserts touch the right
edge of every index. It reveals when a task was submitted and nothing else.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from asyncflow.domain.states import State

DEFAULT_TENANT_ID = 1
"""The one built-in tenant."""


class NewTask(NamedTuple):
    """
    A task as its submitter meant it, before it is a row.

    Attributes:
        payload: JSON text of an object.
        run_at: Never starts before; None means now plus `delay_seconds`, by the
            database's clock.
        delay_seconds: 0 or more; ignored when `run_at` is given.
        expires_at: Never starts after; None means never expires.
        max_attempts, timeout_seconds: None means the handler's setting when it is claimed.
    """

    id: UUID
    tenant_id: int
    name: str
    queue: str
    priority: int
    payload: str
    run_at: datetime | None = None
    delay_seconds: float = 0.0
    expires_at: datetime | None = None
    max_attempts: int | None = None
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """
    A task's row, read at one moment of the database's clock.

    Attributes:
        status: Its state as users see it; see `states.display_status`.
        failure: Of the latest attempt that failed: `{kind, message, traceback}`.
        progress: `{fraction, message}` as the latest attempt reported it, complete once the task
            is; None if it reported none.
        payload: JSON text; None in lists.
        result: JSON text; None in lists and until completed.
        waiting_for: Why a due task has not started, or a running one does not end, if the reason
            will not pass by itself: no live worker offers its name on its queue, the queue is
            paused, no maintenance is running, RabbitMQ refuses us. None otherwise, and in lists.
        attempts: Oldest first; empty in lists.
    """

    id: UUID
    name: str
    queue: str
    status: str
    state: State
    priority: int
    generation: int
    attempt: int
    failures: int
    max_attempts: int | None
    timeout_seconds: float | None
    created_at: datetime
    run_at: datetime
    expires_at: datetime | None
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    worker_id: UUID | None
    failure: dict[str, Any] | None
    progress: dict[str, Any] | None
    payload: str | None = None
    result: str | None = None
    waiting_for: str | None = None
    attempts: tuple[AttemptRecord, ...] = ()


COMPUTED = frozenset({"status", "waiting_for", "attempts"})
"""Fields of `Task` that are not columns. Columns with a default are left out of lists."""


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """
    What is recorded of one execution of a task; the last one may still be running.

    Attributes:
        outcome: `running`, or one of `domain.outcome.OUTCOMES`.
        finished_at: None while it runs.
        failure: `{kind, message, traceback}` or None.
    """

    attempt: int
    generation: int
    outcome: str
    started_at: datetime
    finished_at: datetime | None
    worker_id: UUID | None
    failure: dict[str, Any] | None


class Claim(NamedTuple):
    """
    One task, leased to one worker for one attempt.

    Attributes:
        task_id: Its `id`.
        attempt: 1 for the first claim of the task, over all generations.
        failures: Failures charged before this attempt, in this generation.
        payload: JSON text.
        claimed_at: Its `started_at`, by the database's clock.
    """

    task_id: UUID
    lease_id: UUID
    tenant_id: int
    name: str
    queue: str
    attempt: int
    failures: int
    max_attempts: int
    timeout_seconds: float
    payload: str
    claimed_at: datetime


class TaskIds:
    """
    Makes UUIDv7s that never decrease within one process, even when the clock steps back.

    A 12-bit counter orders the ids of one millisecond (RFC 9562 §6.2, method 1); the other
    62 bits are random.
    """

    def __init__(
        self,
        clock_ns: Callable[[], int] = time.time_ns,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._clock_ns = clock_ns
        self._random_bytes = random_bytes
        self._millisecond = 0
        self._counter = 0

    def next(self) -> UUID:
        """
        The next id; greater than every earlier one of this instance.
        """
        now = self._clock_ns() // 1_000_000
        if now > self._millisecond:
            self._millisecond, self._counter = now, 0
        else:
            self._counter += 1
            if self._counter > 0xFFF:
                self._millisecond, self._counter = self._millisecond + 1, 0
        random = int.from_bytes(self._random_bytes(8), "big") >> 2
        head = self._millisecond << 80 | 0x7 << 76 | self._counter << 64
        return UUID(int=head | 0b10 << 62 | random)
