"""
How a task is treated unless its submitter says otherwise.

A handler declares a `Policy`; workers publish it, and the API fills in what a submission
leaves open. Bounds of every number live here, once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from asyncflow.domain.retry import Backoff

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""What a handler's, task's or queue's name may look like; matched whole."""

PRIORITY_LOWEST, PRIORITY_DEFAULT, PRIORITY_HIGHEST = 0, 4, 9
"""Higher goes first. RabbitMQ 4.0 treats 0-4 as normal and 5-9 as high; 4.3 orders all ten."""

MAX_ATTEMPTS_BOUND = 1_000
TIMEOUT_SECONDS_MIN, TIMEOUT_SECONDS_MAX = 0.001, 7 * 86_400.0
DELAY_SECONDS_MAX = 400 * 86_400.0


@dataclass(frozen=True, slots=True)
class Policy:
    """
    The treatment a handler asks for its tasks.

    Attributes:
        queue: Where its tasks wait.
        max_attempts: How many failed attempts end a task, 1 to 1000.
        timeout_seconds: How long one attempt may take, up to 7 days.
        backoff: The waits between attempts.
    """

    queue: str = "default"
    max_attempts: int = 5
    timeout_seconds: float = 900.0
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.queue):
            raise ValueError(f"queue {self.queue!r}: use 1 to 128 of A-Z a-z 0-9 . _ -")
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS_BOUND:
            raise ValueError(f"max_attempts={self.max_attempts}: it must lie in 1 … 1000.")
        if not TIMEOUT_SECONDS_MIN <= self.timeout_seconds <= TIMEOUT_SECONDS_MAX:
            raise ValueError(
                f"timeout_seconds={self.timeout_seconds}: it must lie in 0.001 … 604800 (7 days)."
            )


DEFAULT_POLICY = Policy()
