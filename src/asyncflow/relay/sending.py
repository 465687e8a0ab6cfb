"""
Publishes hints of one queue, with confirms, and tells which of them RabbitMQ has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asyncflow.relay.dropped import POLICIES, REFUSED
from asyncflow.store.due import Admitted
from asyncflow.telemetry import events
from asyncflow.telemetry.throttle import Throttle
from asyncflow.transport.amqp import Channel, Message, PublishResult
from asyncflow.transport.rabbitmq.message import encode_hints
from asyncflow.transport.rabbitmq.topology import broker_queue

BATCH = 500
"""Most messages in one publish, so that no round trip takes long."""

Pack = list[Admitted]
"""The tasks, of one priority, whose hints travel in one message."""


def batches(admitted: Sequence[Admitted], *, pack: int) -> list[list[Pack]]:
    """
    Pack tasks, at most `pack` together, into batches of messages that are published together.
    """
    packs: list[Pack] = []
    for task in admitted:
        if packs and packs[-1][0].priority == task.priority and len(packs[-1]) < pack:
            packs[-1].append(task)
        else:
            packs.append([task])
    return [packs[begin : begin + BATCH] for begin in range(0, len(packs), BATCH)]


class Sent(NamedTuple):
    """
    What became of a batch.

    Attributes:
        confirmed: The tasks whose hints RabbitMQ has.
        refusal: Why it refused hints; None if it refused none.
    """

    confirmed: list[Admitted]
    refusal: str | None


class Sender:
    """
    Publishes batches of one queue, and logs what RabbitMQ did not accept.
    """

    def __init__(self, *, prefix: str, timeout_seconds: float) -> None:
        self._prefix = prefix
        self._timeout_seconds = timeout_seconds
        self._throttle = Throttle()

    async def publish(self, channel: Channel, queue: str, packs: Sequence[Pack]) -> Sent:
        """
        Publish one batch.

        Raises:
            TransportError: RabbitMQ may have any of the hints; send them all again.
        """
        name = broker_queue(queue, prefix=self._prefix)
        messages = [
            Message(name, encode_hints([t.task_id for t in pack]), priority=pack[0].priority)
            for pack in packs
        ]
        results = await channel.publish(
            messages, exchange="", timeout_seconds=self._timeout_seconds
        )
        outcomes = list(zip(packs, results, strict=True))
        confirmed = [
            task for pack, result in outcomes if result is PublishResult.CONFIRMED for task in pack
        ]
        refusal = POLICIES[REFUSED] if PublishResult.REFUSED in results else None
        self._report_unsent(queue, sum(map(len, packs)) - len(confirmed), refusal)
        return Sent(confirmed, refusal)

    def _report_unsent(self, queue: str, count: int, refusal: str | None) -> None:
        reason = refusal or "The queue was deleted just now; it is declared again."
        if count and (unlogged := self._throttle.add(reason, count)):
            events.hints_not_sent(queue=queue, count=unlogged, reason=reason)
