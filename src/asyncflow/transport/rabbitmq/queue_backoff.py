"""
How long RabbitMQ, or one of its queues, is left alone after a failure.

A queue may have been declared with other properties, or its leader may be gone. Using it costs
the channel, or a wait for an answer that does not come, and the other queues must not pay for
that. So a queue that failed is skipped for a while (a circuit breaker), and retried then.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BackoffTimes:
    """
    Attributes:
        reconnect_seconds: The bounds of a random wait after an outage, so that processes do not
            return in step.
        seconds_max: The longest wait. Waits start at 1 second and double up to this one.
    """

    reconnect_seconds: tuple[float, float] = (0.2, 1.5)
    seconds_max: float = 15.0

    def seconds(self, failures: int) -> float:
        """
        How long to wait after this many failures in a row, 1 or more.
        """
        return min(self.seconds_max, 2.0 ** min(failures - 1, 10))


@dataclass(slots=True)
class QueueBackoff:
    """
    Which queues to skip: each for 1 second after its first failure, then 2, 4, … until it works.

    Times are seconds of one monotonic clock.
    """

    times: BackoffTimes = field(default_factory=BackoffTimes)
    _failures: dict[str, int] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)

    def failed(self, queue: str, *, now: float) -> None:
        """
        Skip `queue` for a while.
        """
        failures = self._failures[queue] = self._failures.get(queue, 0) + 1
        self._until[queue] = now + self.times.seconds(failures)

    def worked(self, queue: str) -> None:
        """
        Forget the failures of `queue`.
        """
        self._failures.pop(queue, None)
        self._until.pop(queue, None)

    def skips(self, queue: str, *, now: float) -> bool:
        """
        Whether to skip `queue` now.
        """
        return now < self._until.get(queue, 0.0)


@dataclass(slots=True)
class ConnectionBackoff:
    """
    How long to wait before connecting again: a moment after an outage, longer after each refusal
    that a person has to resolve.
    """

    times: BackoffTimes = field(default_factory=BackoffTimes)
    _refusals: int = 0
    _was_refused: bool = False

    def failed(self, *, may_pass: bool) -> None:
        """
        Take the end of a connection into account.

        Args:
            may_pass: Whether it was an outage, which passes by itself.
        """
        self._was_refused = not may_pass
        self._refusals += not may_pass

    def worked(self) -> None:
        """
        Forget the refusals.
        """
        self._refusals = 0

    def wait_seconds(self) -> float:
        """
        A random time to wait now.
        """
        if self._was_refused:
            return self.times.seconds(self._refusals) * random.uniform(0.5, 1.0)
        return random.uniform(*self.times.reconnect_seconds)
