"""
The relay: sends hints of admissible tasks to RabbitMQ.

A pending row *is* the outbox entry. Each round asks which queues are open, what RabbitMQ still
holds of each, and fills it up to a short window (see `window`):

    admissible   which tasks may go, highest priority first (PostgreSQL, no lock held)
    publish      their ids, mandatory, persistent, with confirms (RabbitMQ)
    mark_queued  those that were confirmed (PostgreSQL)

Publish before mark: a crash in between repeats a hint, which a claim ignores. The other order
could lose one, and a lost hint looks like a long backlog. No transaction is open while the relay
talks to RabbitMQ, because a memory alarm there can block a publisher for hours.

`feed` does this for one queue. Hints of short tasks are marked a moment later, if at all
(`in_flight`). Hints that RabbitMQ loses (`lost`) or drops (`dropped`) are sent again.

Relays of several maintenance processes elect a leader. The leader's session is the one database
handle of its rounds, so a round fails as soon as the lead is lost.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime
from functools import partial

from asyncflow.aio.waiting import set_within
from asyncflow.errors import InvalidSettings, QueueUnusable, StoreUnavailable, TransportError
from asyncflow.relay.dropped import DroppedHints
from asyncflow.relay.feed import Feed
from asyncflow.relay.times import TIMES, Times
from asyncflow.relay.trouble import CONNECTION, Troubles
from asyncflow.settings import masked
from asyncflow.store import hints
from asyncflow.store.database import Database, Executor
from asyncflow.store.due import Due
from asyncflow.store.hints import OpenQueue
from asyncflow.store.leadership import keep_leading, leadership
from asyncflow.store.wakeups import Listener
from asyncflow.telemetry import events
from asyncflow.transport.amqp import BrokerTimeout, Channel, ChannelClosed, Connection, connect
from asyncflow.transport.rabbitmq.diagnosis import explained
from asyncflow.transport.rabbitmq.ownership import Ownership
from asyncflow.transport.rabbitmq.queue_backoff import (
    ConnectionBackoff,
    QueueBackoff,
)
from asyncflow.transport.rabbitmq.topology import PREFIX, declare_dead_letters

ALARM = "RabbitMQ takes no messages: it has a memory or disk alarm."


class Relay:
    """
    Sends hints while it is the leader.

    Args:
        prefix: What the names in RabbitMQ begin with.
        clock: Seconds of a monotonic clock.
    """

    def __init__(
        self,
        db: Database,
        broker_url: str,
        *,
        prefix: str = PREFIX,
        times: Times = TIMES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db = db
        self._broker_url = broker_url
        self._prefix = prefix
        self._times = times
        self._clock = clock
        self._connection: Connection | None = None
        self._ownership = Ownership(db, prefix=prefix, owned_seconds=times.owned)
        self._connection_backoff = ConnectionBackoff(times.backoff)
        self._queue_backoff = QueueBackoff(times.backoff)
        self._troubles = Troubles()
        self._dropped = DroppedHints(prefix=prefix)
        self._due = Due(db)
        self._feeds: defaultdict[str, Feed] = defaultdict(
            partial(Feed, self._due, self._troubles, prefix=prefix, times=times, clock=clock)
        )
        self._queued_since: dict[str, datetime] = {}
        self._recounted_at = -math.inf
        self._woken = asyncio.Event()

    @property
    def trouble(self) -> str | None:
        """
        Why hints cannot be sent now, or not to some queue; None if all is well.
        """
        if self._connection is not None and self._connection.blocked:
            return ALARM
        return self._troubles.told(now=self._clock())

    # The connection

    async def run(self) -> None:
        """
        Relay until cancelled, through any outage of PostgreSQL or RabbitMQ.
        """
        async with Listener(self._db, self._woken.set), aclosing(self._due):
            while True:
                may_pass = await self._relay_until_it_fails()
                await asyncio.sleep(self._connection_backoff.next(may_pass=may_pass))

    async def _relay_until_it_fails(self) -> bool:
        """
        Relay; report what ends that, and return whether it passes by itself.
        """
        try:
            await self._relay_on_one_connection()
        except QueueUnusable:
            pass  # It was reported, and backs off.
        except (TransportError, InvalidSettings) as error:
            # Settings were checked at the start; a certificate file may go later.
            finding = explained(error, prefix=self._prefix)
            reason, may_pass = str(finding), finding.may_pass
            self._troubles.begin(CONNECTION, reason)
            events.broker_unavailable(role="relay", reason=reason, may_pass=may_pass)
            return may_pass
        except StoreUnavailable as error:
            events.database_unavailable(where="relay", reason=str(error))
        except Exception as error:
            # Tasks wait as long as no relay runs.
            events.chore_failed(chore="relay", reason=repr(error))
        return True

    async def _relay_on_one_connection(self) -> None:
        connection = await connect(
            self._broker_url,
            name="asyncflow relay",
            timeout_seconds=self._times.call,
            on_blocked=_report_blocked,
        )
        try:
            self._connection = connection
            channel = await connection.channel()
            await self._ownership.claim(channel, on_lost=connection.abandon)
            await declare_dead_letters(channel, prefix=self._prefix)
            await channel.confirm_select()
            events.broker_connected(role="relay", url=masked(self._broker_url))
            self._connection_backoff.reset()
            self._troubles.end(CONNECTION)
            await self._lead_whenever_elected(connection, channel)
        finally:
            self._connection = None
            await connection.close()

    # Leadership

    async def _lead_whenever_elected(self, connection: Connection, channel: Channel) -> None:
        while connection.is_open:
            async with leadership(self._db, purpose="relay") as db:
                if db is not None:
                    await self._lead(db, connection, channel)
            await asyncio.sleep(random.uniform(*self._times.lead))

    async def _lead(self, db: Executor, connection: Connection, channel: Channel) -> None:
        async with self._dropped.receiving(connection) as receiving:
            while connection.is_open and receiving.is_open:
                self._woken.clear()
                rest_seconds = await self._run_unless_blocked(db, connection, channel)
                await set_within(self._woken, rest_seconds)

    async def _run_unless_blocked(
        self, db: Executor, connection: Connection, channel: Channel
    ) -> float:
        """
        A round, or none while RabbitMQ takes no messages (a memory or disk alarm).

        The connection is kept through an alarm. RabbitMQ stops reading it once it has seen a
        message, so every new connection would repeat a hint, and so would every timeout.
        """
        if connection.blocked:
            await keep_leading(db)
            return self._times.poll
        try:
            return await self.run_once(db, channel)
        except QueueUnusable as error:
            if connection.blocked:
                return self._times.poll
            reason = str(explained(error.cause, prefix=self._prefix))
            self._queue_backoff.failed(error.queue, now=self._clock())
            self._troubles.begin(error.queue, reason)
            events.broker_queue_unusable(role="relay", queue=error.queue, reason=reason)
            raise

    # One round

    async def run_once(self, db: Executor, channel: Channel) -> float:
        """
        One round over all open queues.

        Returns:
            The seconds until the next round is due if nothing happens meanwhile; less than
            `Times.poll` while a queue may have more to send than its window allowed.

        Raises:
            QueueUnusable: Begin again without that queue.
            TransportError, StoreUnavailable: Nothing is lost; begin again.
        """
        dropped = await self._dropped.unqueue(db)
        for drop in dropped:
            self._feeds[drop.queue].on_dropped(drop)
        queues = await self._open_queues(db)
        now = self._clock()
        served = [queue for queue in queues if not self._queue_backoff.skips(queue.name, now=now)]
        for queue in served:
            await self._serve(db, channel, queue)
        rests = [self._times.poll, *(self._feeds[queue.name].rest_seconds for queue in served)]
        # Hints that are dropped as fast as they are sent must not keep everything busy.
        return max(min(rests), self._times.rest_after_drops if dropped else 0.0)

    async def _open_queues(self, db: Executor) -> list[OpenQueue]:
        now = self._clock()
        if now - self._recounted_at > self._times.recount:
            # Should a mark be written later than all that were counted, it is found now.
            self._recounted_at, self._queued_since = now, {}
        queues = await hints.open_queues(db, queued_since=self._queued_since)
        self._queued_since = {queue.name: queue.queued_since for queue in queues}
        for closed in self._feeds.keys() - self._queued_since.keys():
            # A hint that meets a pause is used up.
            self._feeds[closed].in_flight.clear()
        return queues

    async def _serve(self, db: Executor, channel: Channel, queue: OpenQueue) -> None:
        try:
            await self._feeds[queue.name].serve(db, channel, queue)
        except (BrokerTimeout, ChannelClosed, ValueError) as error:
            raise QueueUnusable(queue.name, error) from error
        self._queue_backoff.worked(queue.name)
        self._troubles.end(queue.name)


def _report_blocked(blocked: bool) -> None:
    if blocked:
        events.broker_blocked(role="relay", reason="a memory or disk alarm")
