"""
How long RabbitMQ, or one of its queues, is left alone after a failure.

A queue may have been declared with other properties, or its leader may be gone; asking
for it costs the channel or a wait for the answer. The queues beside it must not pay for that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

REST_SECONDS_MAX = 15.0
RECONNECT_SECONDS = (0.2, 1.5)
"""A random wait after an outage, so that processes do not return in step."""


@dataclass(slots=True)
class RestingQueues:
    """
    Rests of 1 second, then 2, 4, … up to fifteen, until the queue works again.

    Times are of one monotonic clock, in seconds.
    """

    _failures: dict[str, int] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)

    def failed(self, queue: str, *, now: float) -> None:
        """
        Leave `queue` alone for a while.
        """
        failures = self._failures[queue] = min(10, self._failures.get(queue, 0) + 1)
        self._until[queue] = now + min(REST_SECONDS_MAX, 2.0 ** (failures - 1))

    def worked(self, queue: str) -> None:
        """
        Forget what was wrong with `queue`.
        """
        self._failures.pop(queue, None)
        self._until.pop(queue, None)

    def rests(self, queue: str, *, now: float) -> bool:
        """
        Whether to leave `queue` alone now.
        """
        return now < self._until.get(queue, 0.0)


@dataclass(slots=True)
class Reconnecting:
    """
    Waits between tries to connect: short after an outage, ever longer where a person has to
    change something first.
    """

    _refusals: int = 0

    def wait_seconds(self, *, may_pass: bool) -> float:
        """
        How long to wait before the next try, from what ended the last one.
        """
        if may_pass:
            return random.uniform(*RECONNECT_SECONDS)
        self._refusals = min(10, self._refusals + 1)
        return min(REST_SECONDS_MAX, 2.0 ** (self._refusals - 1)) * random.uniform(0.5, 1.0)

    def worked(self) -> None:
        """
        Begin anew: RabbitMQ served.
        """
        self._refusals = 0
