"""
A task as its submitter meant it, before it is a row.

The id is a UUIDv7 (RFC 9562 §5.7), so that ids sort by submission and inserts touch the
right edge of every index. It tells when a task was submitted; nothing else is in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

DEFAULT_TENANT_ID = 1
"""The one built-in tenant."""


class NewTask(NamedTuple):
    """
    Everything `store.tasks.submit` writes.

    Attributes:
        payload: JSON text of an object.
        run_at: Never starts before; None means now plus `delay_seconds`, by the
            database's clock.
        delay_seconds: 0 or more; ignored when `run_at` is given.
        expires_at: Never starts after; None means never expires.
        max_attempts, timeout_seconds: None means as the handler says when it is claimed.
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
