"""
How a task is handled unless its submission says otherwise.

A handler declares a `Policy`; it applies where a submission leaves something open. The bounds of
every number are here, once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from asyncflow.domain.retry import Backoff

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,128}")
"""A valid name of a handler, task or queue; matched as a whole."""

PRIORITY_LOWEST, PRIORITY_DEFAULT, PRIORITY_HIGHEST = 0, 4, 9
"""Higher goes first. RabbitMQ 4.0 treats 0-4 as normal and 5-9 as high; 4.3 orders all ten."""

MAX_ATTEMPTS_BOUND = 1_000
TIMEOUT_SECONDS_MIN, TIMEOUT_SECONDS_MAX = 0.001, 7 * 86_400.0
DELAY_SECONDS_MAX = 400 * 86_400.0


@dataclass(frozen=True, slots=True)
class Policy:
    """
    The settings of a handler for its tasks.

    Attributes:
        queue: The queue of its tasks.
        max_attempts: The number of failures that ends a task, 1 to 1000.
        timeout_seconds: Time limit of one attempt, up to 7 days.
        backoff: The delays between attempts.
    """

    queue: str = "default"
    max_attempts: int = 5
    timeout_seconds: float = 900.0
    backoff: Backoff = field(default_factory=Backoff)

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.queue):
            raise ValueError(
                f"invalid queue name {self.queue!r}: 1-128 characters from [A-Za-z0-9._-]"
            )
        if not 1 <= self.max_attempts <= MAX_ATTEMPTS_BOUND:
            raise ValueError(f"max_attempts={self.max_attempts} must be between 1 and 1,000")
        if not TIMEOUT_SECONDS_MIN <= self.timeout_seconds <= TIMEOUT_SECONDS_MAX:
            raise ValueError(
                f"timeout_seconds={self.timeout_seconds} must be between 0.001 and 604,800 (7 days)"
            )


DEFAULT_POLICY = Policy()
