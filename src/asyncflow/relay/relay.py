"""
The relay: sends hints of admissible tasks to RabbitMQ.

A pending row *is* the outbox entry. Each round asks which queues are open, what RabbitMQ
still holds of each, and fills it up to a short window:

    admissible   which tasks may go, highest priority first (PostgreSQL, no lock held)
    publish      their ids, mandatory, persistent, with confirms (RabbitMQ)
    mark_queued  those that were confirmed (PostgreSQL)

Publish before mark: a crash in between repeats a hint, which a claim ignores. The other
order could lose one, and a lost hint looks like a long backlog. No transaction is open while
RabbitMQ is being talked to, because a memory alarm there can block a publisher for hours.

A mark costs PostgreSQL as much as a claim, and tasks that travel in packs are claimed within
milliseconds. So theirs waits a moment, and is never made for those that have moved on
(`Unmarked`).

The window is short so that priority and pause act at once: what is inside RabbitMQ has
been decided. It starts at a multiple of the workers' slots, doubles while workers all but
empty it between two rounds that follow at once, and shrinks again. Only a window that has
grown, which is to say only for short tasks, is sent in packs of several hints per message; slow
tasks travel one by one, so that workers share them evenly. How soon a full window is looked at
again follows from how much of it was used up since (`Window.rest_seconds`).

Hints can get lost: a queue is purged or deleted, a disk dies. So each round also compares
how many tasks have been queued for a while with how many hints the ready messages can hold;
the surplus has no message any more and goes back to pending.

An operator's policy may limit a queue's length or its messages' age. What RabbitMQ drops for it
comes back through a queue of its own: its tasks are pending again immediately, and the window
shrinks until it fits.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from datetime import datetime
from uuid import UUID

from asyncflow.errors import (
    InvalidSettings,
    QueueUnusable,
    StoreError,
    StoreUnavailable,
    TransportError,
)
from asyncflow.findings import Finding
from asyncflow.settings import masked
from asyncflow.store import hints
from asyncflow.store.database import Database, Executor
from asyncflow.store.due import Admitted, Due
from asyncflow.store.hints import OpenQueue
from asyncflow.store.installation import identity
from asyncflow.store.leadership import leadership
from asyncflow.store.wakeups import Listener
from asyncflow.telemetry import events
from asyncflow.telemetry.seldom import Seldom
from asyncflow.transport.amqp import (
    BrokerTimeout,
    Channel,
    ChannelClosed,
    Connection,
    Delivery,
    MalformedFrame,
    Message,
    PublishResult,
    QueueCounts,
    connect,
)
from asyncflow.transport.rabbitmq.diagnosis import explained
from asyncflow.transport.rabbitmq.queue_backoff import Reconnecting, RestingQueues
from asyncflow.transport.rabbitmq.topology import (
    PACK_MAX,
    PREFIX,
    broker_queue,
    declare_dead_letters,
    declare_task_queue,
    decode_hints,
    dropped,
    encode_hints,
    own,
)

POLL_SECONDS = 0.5
REFILL_SECONDS = 0.01
LEADERSHIP_SECONDS = (0.3, 1.0)
CALL_TIMEOUT_SECONDS = 3.0
"""Less than the leader's session may idle, so that an alarm does not end it."""

BATCH = 500
WINDOW_PER_SLOT = 2
WINDOW_MIN, WINDOW_MAX = 16, 1_500
DRAINED = 1 / 8
"""A window with no more than this part of it left was too small, or looked at too late."""

LOST_AFTER_SECONDS = 3.0
LOST_BATCH = 5_000
RECOUNT_SECONDS = 60.0
PACKS_REMEMBERED_SECONDS = 60.0
MARK_AFTER_SECONDS = 0.2

DROPPED_MESSAGES_MAX = 100
DROPPED_REST_SECONDS = 0.1
SHRUNK_SECONDS = 60.0
"""How long a window is kept as small as a queue's limits ask."""


_LEAVE_OUT = "leave AsyncFlow's queues out of the policy or operator policy"
POLICIES = {
    "expired": f"A policy sets message-ttl, which these hints outlived; {_LEAVE_OUT}.",
    "maxlen": f"A policy sets max-length or max-length-bytes; {_LEAVE_OUT}, or raise the limit.",
    "delivery_limit": f"A policy sets delivery-limit; {_LEAVE_OUT}.",
    "refused": (
        "RabbitMQ refused them: a policy sets max-length and overflow reject-publish, or the queue "
        f"has lost its majority; {_LEAVE_OUT}, or start the nodes that are missing."
    ),
}
"""What takes hints out of a queue, by the reason that RabbitMQ gives, and the remedy."""


class Window:
    """
    How many hints of one queue RabbitMQ should hold ready, in packs of how many, and how soon
    to look again.

    Attributes:
        rest_seconds: After how long it should be filled up again, if more is waiting for it:
            when between a quarter and a half of it is used up.
    """

    def __init__(self) -> None:
        self.rest_seconds = REFILL_SECONDS
        self._looked_at = -math.inf
        self._size = 0
        self._floor = WINDOW_MIN
        self._was_filled = False
        self._size_max = WINDOW_MAX
        self._shrunk_until = -math.inf
        # Of what a former leader sent only this is known.
        self._largest_pack = PACK_MAX
        self._largest_pack_at = time.monotonic()

    def room(self, *, ready: int, slots: int, now: float) -> int:
        """
        How many more hints to publish now, from what happened since the last call.

        Args:
            now: In seconds of the monotonic clock.
        """
        rested, self._looked_at = now - self._looked_at, now
        self._floor = max(WINDOW_MIN, WINDOW_PER_SLOT * slots)
        if self._was_filled and ready <= self._size * DRAINED:
            if self.rest_seconds > REFILL_SECONDS:
                self.rest_seconds = REFILL_SECONDS
            else:
                self._size = min(WINDOW_MAX, 2 * self._size)
        elif ready > self._size // 2:
            self._size -= self._size // 16
        self._size = max(self._floor, self._size)
        if now < self._shrunk_until:
            self._size = min(self._size, self._size_max)
        room = max(0, self._size - ready)
        if self.pack > 1:
            self.rest_seconds = REFILL_SECONDS
        elif room > self._size // 2:
            self.rest_seconds = max(REFILL_SECONDS, self.rest_seconds / 2)
        elif room < self._size // 4 and rested >= self.rest_seconds:
            # That little was used up since a wake-up, or a look for another queue, says nothing.
            self.rest_seconds = min(POLL_SECONDS, 2 * self.rest_seconds)
        # Where many go, they go many at a time: a round costs as much for few.
        return room if self.pack == 1 or room >= self._size // 2 else 0

    @property
    def pack(self) -> int:
        """
        How many hints to put into one message: few enough that every slot gets messages.
        """
        return max(1, min(PACK_MAX, self._size // self._floor))

    def shrink(self, *, now: float) -> None:
        """
        Halve it for a while: RabbitMQ did not keep all of what was sent.
        """
        size = min(self._size, self._size_max) if now < self._shrunk_until else self._size
        self._size_max = max(1, size // 2)
        self._shrunk_until = now + SHRUNK_SECONDS

    def note(self, *, is_full: bool) -> None:
        """
        Remember whether the last round filled the window, or ran out of tasks.
        """
        self._was_filled = is_full

    def note_pack(self, hints: int) -> None:
        """
        Remember that a message with so many hints is being sent.
        """
        if hints >= self._largest_pack:
            self._largest_pack, self._largest_pack_at = hints, time.monotonic()

    def hints_max(self, counts: QueueCounts, *, queued: int) -> int:
        """
        How many of `queued` tasks can have a hint in the messages that are ready.

        Packs that nobody has taken for a minute count no more. If that is wrong, hints are
        sent twice; the other mistake would leave a lost one lost while a backlog lasts.
        """
        age_seconds = time.monotonic() - self._largest_pack_at
        if queued == 0 or age_seconds > PACKS_REMEMBERED_SECONDS:
            self._largest_pack = 1
        return min(queued, counts.messages * self._largest_pack)


class Unmarked:
    """
    Tasks of one queue whose hints RabbitMQ has confirmed, and which are not marked as queued.

    To forget one of them is always safe: if it is still pending, it is sent again.
    """

    def __init__(self) -> None:
        self._attempts: dict[UUID, int] = {}
        self._sent: deque[tuple[float, list[Admitted]]] = deque()

    def __len__(self) -> int:
        return len(self._attempts)

    def __contains__(self, task: Admitted) -> bool:
        # Another attempt needs another hint.
        return self._attempts.get(task.task_id) == task.attempt

    def add(self, sent: list[Admitted], *, now: float) -> None:
        """
        Remember what was sent just now.
        """
        self._attempts.update((task.task_id, task.attempt) for task in sent)
        self._sent.append((now, sent))

    def put_back(self, tasks: list[Admitted]) -> None:
        """
        Remember what could not be marked; it is the first to be taken out again.
        """
        self._attempts.update((task.task_id, task.attempt) for task in tasks)
        self._sent.appendleft((-math.inf, tasks))

    def keep(self, pending: Sequence[Admitted]) -> None:
        """
        Forget all that is not among the tasks that are still pending.
        """
        self._attempts = {task.task_id: task.attempt for task in pending if task in self}

    def forget(self, task_ids: Sequence[UUID]) -> None:
        """
        Forget these, whose hints are gone.
        """
        for task_id in task_ids:
            self._attempts.pop(task_id, None)

    def pop(self, *, before: float) -> list[Admitted]:
        """
        Take out what was sent earlier than `before`.
        """
        taken: list[Admitted] = []
        while self._sent and self._sent[0][0] <= before:
            _, sent = self._sent.popleft()
            for task in sent:
                if task in self:
                    del self._attempts[task.task_id]
                    taken.append(task)
        return taken


class Relay:
    """
    Sends hints while it is the leader.

    Args:
        prefix: What the names in RabbitMQ begin with.
    """

    def __init__(
        self,
        db: Database,
        broker_url: str,
        *,
        prefix: str = PREFIX,
    ) -> None:
        self._db = db
        self._broker_url = broker_url
        self._prefix = prefix
        self._installation: str | None = None
        self._connection: Connection | None = None
        self._troubles: dict[str, str] = {}
        self._limited = (-math.inf, "")
        self._dropped: list[tuple[Channel, Delivery]] = []
        self._seldom = Seldom()
        self._windows: defaultdict[str, Window] = defaultdict(Window)
        self._unmarked: defaultdict[str, Unmarked] = defaultdict(Unmarked)
        self._due = Due(db)
        self._queued_since: dict[str, datetime] = {}
        self._recounted_at = -math.inf
        self._resting = RestingQueues()
        self._reconnecting = Reconnecting()
        self._woken = asyncio.Event()

    @property
    def trouble(self) -> str | None:
        """
        Why hints cannot be sent now, or not for some queue; None if all is well.
        """
        if self._connection is not None and self._connection.blocked:
            return "RabbitMQ takes no messages: it has a memory or disk alarm."
        limited_at, limit = self._limited
        if self._troubles or time.monotonic() > limited_at + SHRUNK_SECONDS:
            return next(iter(self._troubles.values()), None)
        return limit

    async def run(self) -> None:
        """
        Relay for ever, through any outage of PostgreSQL or RabbitMQ.
        """
        async with Listener(self._db, self._woken.set), aclosing(self._due):
            while True:
                may_pass = True
                try:
                    await self._relay_on_one_connection()
                except QueueUnusable:
                    pass  # It was reported, and rests.
                except (TransportError, InvalidSettings) as error:
                    # Settings were checked at the start; a certificate file may go later.
                    finding = self._explained(error)
                    may_pass = finding.may_pass
                    self._troubles[""] = str(finding)
                    events.broker_unavailable(role="relay", reason=str(finding), may_pass=may_pass)
                except StoreUnavailable as error:
                    events.database_unavailable(where="relay", reason=str(error))
                except Exception as error:
                    # Tasks wait as long as no relay runs.
                    events.chore_failed(chore="relay", reason=repr(error))
                await asyncio.sleep(self._reconnecting.wait_seconds(may_pass=may_pass))

    async def _relay_on_one_connection(self) -> None:
        connection = await connect(
            self._broker_url,
            name="asyncflow relay",
            timeout_seconds=CALL_TIMEOUT_SECONDS,
            on_blocked=_report_blocked,
        )
        try:
            self._connection = connection
            channel = await connection.channel()
            await self._own(connection, channel)
            await declare_dead_letters(channel, prefix=self._prefix)
            await channel.confirm_select()
            events.broker_connected(role="relay", url=masked(self._broker_url))
            self._reconnecting.worked()
            self._troubles.pop("", None)
            while connection.is_open:
                async with leadership(self._db, purpose="relay") as db:
                    if db is not None:
                        await self._lead(db, connection, channel)
                await asyncio.sleep(random.uniform(*LEADERSHIP_SECONDS))
        finally:
            self._connection = None
            await connection.close()

    async def _own(self, connection: Connection, channel: Channel) -> None:
        """
        Make sure that no other installation takes its hints where this one's are sent.
        """
        self._installation = self._installation or await identity(self._db)
        if self._installation is not None:
            await own(
                channel,
                installation=self._installation,
                prefix=self._prefix,
                on_lost=connection.abandon,
            )

    async def _lead(self, db: Executor, connection: Connection, channel: Channel) -> None:
        async with self._hearing_of_drops(connection) as hearing:
            while connection.is_open and hearing.is_open:
                self._woken.clear()
                rest_seconds = await self._run_unless_blocked(db, connection, channel)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rest_seconds):
                        await self._woken.wait()

    @contextlib.asynccontextmanager
    async def _hearing_of_drops(self, connection: Connection) -> AsyncIterator[Channel]:
        channel = await connection.channel()
        try:
            await channel.consume(
                dropped(self._prefix),
                prefetch=DROPPED_MESSAGES_MAX,
                on_deliveries=lambda found: self._dropped.extend((channel, one) for one in found),
                on_cancelled=channel.abandon,
            )
            yield channel
        finally:
            self._dropped.clear()
            channel.abandon()

    async def _run_unless_blocked(
        self, db: Executor, connection: Connection, channel: Channel
    ) -> float:
        """
        A round, or none while RabbitMQ takes no messages (a memory or disk alarm).

        The connection is kept through an alarm. RabbitMQ stops reading it once it has seen a
        message, so every new one would bring some hint again, and so would every timeout.
        """
        if connection.blocked:
            # A session that is silent for too long loses the leadership.
            await self._open_queues(db)
            return POLL_SECONDS
        try:
            return await self.run_once(db, channel)
        except QueueUnusable as error:
            if connection.blocked:
                return POLL_SECONDS
            self._resting.failed(error.queue, now=time.monotonic())
            reason = self._troubles[error.queue] = str(self._explained(error.cause))
            events.broker_queue_unusable(role="relay", queue=error.queue, reason=reason)
            raise

    def _explained(self, error: Exception) -> Finding:
        return explained(error, prefix=self._prefix)

    async def run_once(self, db: Executor, channel: Channel) -> float:
        """
        One round over all open queues.

        Returns:
            After how many seconds the next one is due if nothing happens meanwhile; less than
            `POLL_SECONDS` while some queue may have more to send than its window allowed, and
            workers make room in it.

        Raises:
            QueueUnusable: Begin again without that queue.
            TransportError, StoreUnavailable: Nothing is lost; begin again.
        """
        rest_seconds = POLL_SECONDS
        has_dropped = await self._take_back_dropped()
        queues = await self._open_queues(db)
        for closed in self._unmarked.keys() - {queue.name for queue in queues}:
            # A hint that meets a pause is used up.
            del self._unmarked[closed]
        for queue in queues:
            if self._resting.rests(queue.name, now=time.monotonic()):
                continue
            try:
                counts = await declare_task_queue(channel, queue.name, prefix=self._prefix)
                sent = queue.queued + len(self._unmarked[queue.name])
                ready = self._windows[queue.name].hints_max(counts, queued=sent)
                await self._find_lost(queue, ready=ready)
                await self._mark_due(queue.name)
                if await self._fill(db, channel, queue, ready=ready):
                    rest_seconds = min(rest_seconds, self._windows[queue.name].rest_seconds)
            except (BrokerTimeout, ChannelClosed, ValueError) as error:
                raise QueueUnusable(queue.name, error) from error
            self._resting.worked(queue.name)
            self._troubles.pop(queue.name, None)
        if any(self._unmarked.values()):
            rest_seconds = min(rest_seconds, MARK_AFTER_SECONDS)
        # What is dropped as fast as it is sent must not keep everybody busy.
        return max(rest_seconds, DROPPED_REST_SECONDS) if has_dropped else rest_seconds

    async def _take_back_dropped(self) -> bool:
        """
        Let the tasks whose hints RabbitMQ dropped go again; return whether there were any.
        """
        found, self._dropped = self._dropped, []
        causes: Counter[tuple[str, str]] = Counter()
        for _, message in found:
            queue = message.routing_key.removeprefix(broker_queue("", prefix=self._prefix))
            task_ids = decode_hints(message.body)
            if task_ids is None:
                events.message_unreadable(
                    queue=message.routing_key, body_bytes=len(message.body or b"")
                )
                continue
            await hints.unqueue_dropped(self._db, task_ids)
            self._unmarked[queue].forget(task_ids)
            causes[queue, _cause_of_death(message)] += len(task_ids)
        for channel, message in found:
            channel.ack(message.tag)
        for (queue, cause), count in causes.items():
            sentence = POLICIES.get(cause, f"RabbitMQ dropped it ({cause}).")
            self._shrink(queue, sentence)
            if unsaid := self._seldom.count((queue, cause), count):
                events.hints_dropped(queue=queue, cause=sentence, count=unsaid)
        return bool(found)

    def _shrink(self, queue: str, reason: str) -> None:
        now = time.monotonic()
        self._windows[queue].shrink(now=now)
        self._limited = now, reason

    async def _open_queues(self, db: Executor) -> list[OpenQueue]:
        now = time.monotonic()
        if now - self._recounted_at > RECOUNT_SECONDS:
            # Should a note be written later than any that was counted, it is found now.
            self._recounted_at, self._queued_since = now, {}
        queues = await hints.open_queues(db, queued_since=self._queued_since)
        self._queued_since = {queue.name: queue.queued_since for queue in queues}
        return queues

    async def _mark_due(self, queue: str) -> None:
        before = time.monotonic() - MARK_AFTER_SECONDS
        await self._mark(queue, self._unmarked[queue].pop(before=before))

    async def _mark(self, queue: str, sent: list[Admitted]) -> None:
        """
        Note that hints for these tasks are in RabbitMQ.

        A PostgreSQL that is full or read-only takes no notes for a while. What was sent must be
        remembered then: forgotten, it would be sent again with every try, and RabbitMQ would fill
        up with hints of the same few tasks.
        """
        try:
            for begin in range(0, len(sent), BATCH):
                # Through the pool: a connection, such as the leader's, does one thing at a time.
                await hints.mark_queued(self._db, sent[begin : begin + BATCH])
        except StoreError:
            self._unmarked[queue].put_back(sent)
            raise

    async def _fill(self, db: Executor, channel: Channel, queue: OpenQueue, *, ready: int) -> bool:
        """
        Send what there is room for; return whether the window is full, so that more may wait.
        """
        window, unmarked = self._windows[queue.name], self._unmarked[queue.name]
        room = window.room(ready=ready, slots=queue.slots, now=time.monotonic())
        admitted: list[Admitted] = []
        if room:
            pending = await self._due.admissible(
                db, queue=queue.name, names=queue.names, limit=room + len(unmarked)
            )
            admitted = [task for task in pending if task not in unmarked][:room]
            unmarked.keep(pending)
        # Published in order, all at once; each batch is noted while later ones are on their way.
        results = await asyncio.gather(
            *[
                self._send(channel, queue.name, admitted[begin : begin + BATCH])
                for begin in range(0, len(admitted), BATCH)
            ],
            return_exceptions=True,
        )
        sent = 0
        for result in results:
            if isinstance(result, BaseException):
                raise result
            sent += result
        is_full = sent >= room
        window.note(is_full=is_full)
        return is_full

    async def _send(self, channel: Channel, queue: str, admitted: Sequence[Admitted]) -> int:
        confirmed = await self._publish(channel, queue, admitted)
        if self._windows[queue].pack > 1:
            self._unmarked[queue].add(confirmed, now=time.monotonic())
        elif confirmed:
            await self._mark(queue, confirmed)
        return len(confirmed)

    async def _publish(
        self, channel: Channel, queue: str, admitted: Sequence[Admitted]
    ) -> list[Admitted]:
        window = self._windows[queue]
        packs = _packs(admitted, hints_max=window.pack)
        window.note_pack(max(len(pack) for pack in packs))
        messages = [
            Message(
                broker_queue(queue, prefix=self._prefix),
                encode_hints([task.task_id for task in pack]),
                priority=pack[0].priority,
            )
            for pack in packs
        ]
        results = await channel.publish(messages, exchange="", timeout_seconds=CALL_TIMEOUT_SECONDS)
        confirmed = [
            task
            for pack, result in zip(packs, results, strict=True)
            if result is PublishResult.CONFIRMED
            for task in pack
        ]
        if len(confirmed) < len(admitted):
            self._report_unsent(queue, results, count=len(admitted) - len(confirmed))
        return confirmed

    def _report_unsent(self, queue: str, results: Sequence[PublishResult], *, count: int) -> None:
        if PublishResult.REFUSED in results:
            reason = POLICIES["refused"]
            self._shrink(queue, reason)
        else:
            reason = "The queue was deleted just now; it is declared again."
        if unsaid := self._seldom.count((queue, reason), count):
            events.hints_not_sent(queue=queue, count=unsaid, reason=reason)

    async def _find_lost(self, queue: OpenQueue, *, ready: int) -> None:
        if queue.queued <= ready:
            return
        count = await hints.unqueue_lost(
            self._db,
            queue=queue.name,
            older_than_seconds=LOST_AFTER_SECONDS,
            ready=ready,
            limit=LOST_BATCH,
            since=queue.queued_since,
        )
        if count:
            events.hints_lost(queue=queue.name, count=count)


def _packs(admitted: Sequence[Admitted], *, hints_max: int) -> list[list[Admitted]]:
    """
    What goes in one message each: tasks of one priority.
    """
    packs: list[list[Admitted]] = []
    for task in admitted:
        if packs and packs[-1][0].priority == task.priority and len(packs[-1]) < hints_max:
            packs[-1].append(task)
        else:
            packs.append([task])
    return packs


def _cause_of_death(message: Delivery) -> str:
    try:
        return str(message.headers.get("x-last-death-reason"))
    except MalformedFrame:
        return "unknown"


def _report_blocked(blocked: bool) -> None:
    if blocked:
        events.broker_blocked(role="relay", reason="a memory or disk alarm")
