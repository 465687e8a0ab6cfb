"""
Feeds one queue: declares it, notices lost hints, marks what is in flight, and fills its window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from asyncflow.relay.dropped import Dropped
from asyncflow.relay.in_flight import InFlight
from asyncflow.relay.lost import LargestPack, unqueue_lost
from asyncflow.relay.sending import Pack, Sender, batches
from asyncflow.relay.times import Times
from asyncflow.relay.trouble import Troubles
from asyncflow.relay.window import Window
from asyncflow.store import hints
from asyncflow.store.database import Executor
from asyncflow.store.due import Admitted, Due
from asyncflow.store.hints import OpenQueue
from asyncflow.transport.amqp import Channel
from asyncflow.transport.rabbitmq.topology import declare_task_queue

MARK_BATCH = 500


class Feed:
    """
    What the relay knows of one queue from earlier rounds, and the queue's share of a round.

    Attributes:
        window: As the last round left it.
        in_flight: Tasks that were sent and are not marked yet.
    """

    def __init__(
        self,
        due: Due,
        troubles: Troubles,
        *,
        prefix: str,
        times: Times,
        clock: Callable[[], float],
    ) -> None:
        self.window = Window(rest_seconds_max=times.poll)
        self.in_flight = InFlight()
        self._largest_pack = LargestPack(remembered_seconds=times.packs_remembered, now=clock())
        self._sender = Sender(prefix=prefix, timeout_seconds=times.call)
        self._due = due
        self._troubles = troubles
        self._prefix = prefix
        self._times = times
        self._clock = clock

    async def serve(self, db: Executor, channel: Channel, queue: OpenQueue) -> None:
        """
        Bring the queue in RabbitMQ up to date, and fill it up to its window.

        Raises:
            TransportError, StoreError: What is not known to be sent is sent again later.
        """
        counts = await declare_task_queue(channel, queue.name, prefix=self._prefix)
        ready = self._hints_ready(counts.messages, queued=queue.queued)
        await unqueue_lost(db, queue, ready=ready, older_than_seconds=self._times.lost_after)
        await self._mark(db, self.in_flight.pop(before=self._clock() - self._times.mark_after))
        self.window = self.window.observed(ready=ready, slots=queue.slots, now=self._clock())
        sent = 0
        for packs in batches(await self._next(db, queue), pack=self.window.pack):
            sent += await self._send(db, channel, queue.name, packs)
        self.window = self.window.filled(sent=sent)

    @property
    def rest_seconds(self) -> float:
        """
        How soon the queue should be served again.
        """
        rest_seconds = self.window.rest_seconds if self.window.is_full else self._times.poll
        return min(rest_seconds, self._times.mark_after) if self.in_flight else rest_seconds

    def on_dropped(self, drop: Dropped) -> None:
        """
        Forget hints that RabbitMQ dropped, and send fewer for a while.
        """
        self.in_flight.forget(drop.task_ids)
        self._shrink(drop.cause)

    def _shrink(self, reason: str) -> None:
        now = self._clock()
        self.window = self.window.halved(now=now)
        self._troubles.limit(reason, now=now)

    def _hints_ready(self, messages: int, *, queued: int) -> int:
        """
        How many tasks have a hint, at most, in the messages that are ready.
        """
        sent = queued + len(self.in_flight)
        if not sent:
            self._largest_pack.forget()
        return min(sent, messages * self._largest_pack.hints(now=self._clock()))

    async def _next(self, db: Executor, queue: OpenQueue) -> list[Admitted]:
        room = self.window.room
        if not room:
            return []
        pending = await self._due.admissible(
            db, queue=queue.name, names=queue.names, limit=room + len(self.in_flight)
        )
        admitted = [task for task in pending if task not in self.in_flight][:room]
        self.in_flight.keep(pending)
        return admitted

    async def _send(self, db: Executor, channel: Channel, queue: str, packs: Sequence[Pack]) -> int:
        """
        Send one batch; return how many hints RabbitMQ confirmed.
        """
        self._largest_pack.sent(max(len(pack) for pack in packs), now=self._clock())
        sent = await self._sender.publish(channel, queue, packs)
        if sent.refusal is not None:
            self._shrink(sent.refusal)
        if self.window.pack > 1:
            self.in_flight.add(sent.confirmed, now=self._clock())
        else:
            await self._mark(db, sent.confirmed)
        return len(sent.confirmed)

    async def _mark(self, db: Executor, sent: list[Admitted]) -> None:
        """
        Mark tasks as queued.

        While PostgreSQL is full or read-only, tasks cannot be marked. Then they stay in flight:
        forgotten, they would be sent again with every try, and RabbitMQ would fill up with hints
        of the same few tasks.
        """
        try:
            for begin in range(0, len(sent), MARK_BATCH):
                await hints.mark_queued(db, sent[begin : begin + MARK_BATCH])
        except Exception:
            self.in_flight.put_back(sent)
            raise
