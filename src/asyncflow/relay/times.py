"""
The relay's times, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from asyncflow.relay.window import REST_SECONDS_MAX
from asyncflow.transport.rabbitmq.ownership import OWNED_SECONDS
from asyncflow.transport.rabbitmq.queue_backoff import BackoffTimes


@dataclass(frozen=True, slots=True)
class Times:
    """
    Attributes:
        poll: The longest rest between two rounds.
        lead: Bounds of the random rest between two tries to become the leader.
        call: How long RabbitMQ may take to answer; less than the leader's session may be idle, so
            that an alarm does not end it.
        lost_after: How long a hint may be on its way to a worker before it may count as lost.
        mark_after: How long tasks that were sent in packs stay unmarked.
        packs_remembered: How long a pack may wait in RabbitMQ before it counts as one hint.
        recount: How often queued tasks are counted from the oldest on.
        rest_after_drops: The shortest rest after RabbitMQ dropped hints.
        backoff: Waits after failures.
        owned: How long the names in RabbitMQ stay ours after the last process has left.
    """

    poll: float = REST_SECONDS_MAX
    lead: tuple[float, float] = (0.3, 1.0)
    call: float = 3.0
    lost_after: float = 3.0
    mark_after: float = 0.2
    packs_remembered: float = 60.0
    recount: float = 60.0
    rest_after_drops: float = 0.1
    backoff: BackoffTimes = field(default_factory=BackoffTimes)
    owned: float = OWNED_SECONDS


TIMES = Times()
