"""
How long RabbitMQ, or one of its queues, is left alone after a failure.

A queue may have been declared with other properties, or its leader may be gone. Using it costs
the channel, or a wait for an answer that does not come, and the other queues must not pay for
that. So a queue that failed is skipped for a while (a circuit breaker), and retried then.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncflow.aio.waiting import Delays


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

    def delays(self, *, jitter: float) -> Delays:
        """
        Waits that grow.
        """
        return Delays(min(1.0, self.seconds_max), longest=self.seconds_max, jitter=jitter)


@dataclass(slots=True)
class QueueBackoff:
    """
    Which queues to skip: each for 1 second after its first failure, then 2, 4, … until it works.

    Times are seconds of one monotonic clock.
    """

    times: BackoffTimes = field(default_factory=BackoffTimes)
    _delays: dict[str, Delays] = field(default_factory=dict)
    _until: dict[str, float] = field(default_factory=dict)

    def failed(self, queue: str, *, now: float) -> None:
        """
        Skip `queue` for a while.
        """
        delays = self._delays.setdefault(queue, self.times.delays(jitter=0))
        self._until[queue] = now + delays.next()

    def worked(self, queue: str) -> None:
        """
        Forget the failures of `queue`.
        """
        self._delays.pop(queue, None)
        self._until.pop(queue, None)

    def skips(self, queue: str, *, now: float) -> bool:
        """
        Whether to skip `queue` now.
        """
        return now < self._until.get(queue, 0.0)


class ConnectionBackoff:
    """
    How long to wait before connecting again: a moment after an outage, longer after each refusal
    that a person has to resolve.
    """

    def __init__(self, times: BackoffTimes) -> None:
        shortest, longest = times.reconnect_seconds
        self._after_outage = Delays(longest, jitter=1 - shortest / longest)
        self._after_refusal = times.delays(jitter=0.5)

    def next(self, *, may_pass: bool) -> float:
        """
        The seconds to wait after a connection ended.

        Args:
            may_pass: Whether an outage ended it, which passes by itself, rather than a refusal.
        """
        return (self._after_outage if may_pass else self._after_refusal).next()

    def reset(self) -> None:
        """
        Forget the refusals: RabbitMQ accepted a connection.
        """
        self._after_refusal.reset()
