"""
Queues in RabbitMQ that cannot be used just now, and how long they are left alone.

A queue may have been declared with other properties, or its leader may be gone; whoever asks
for it loses the channel or waits for the answer. The queues beside it must not pay for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

REST_SECONDS_MAX = 60.0


@dataclass(slots=True)
class RestingQueues:
    """
    Rests of 1 second, then 2, 4, … up to a minute, until the queue works again.

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
