"""
What hints through RabbitMQ guarantee beyond `test_conformance`: nothing that happens to a message,
a queue or a connection loses a task or runs it twice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import pytest

from asyncflow.domain.task import Claim
from asyncflow.relay.relay import Relay
from asyncflow.store import queues
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.transport import Claimant
from asyncflow.transport.amqp import Channel, Delivery, Message, PublishResult, connect
from asyncflow.transport.rabbitmq.consumer import Prefetch
from asyncflow.transport.rabbitmq.message import PACK_MAX, encode_hints
from asyncflow.transport.rabbitmq.topology import (
    broker_queue,
    declare_dead_letters,
    declare_task_queue,
    unreadable,
)
from asyncflow.transport.rabbitmq.transport import TIMES, RabbitTransport, Times
from tests.support.broker import Broker
from tests.support.postgres import PostgresServer
from tests.support.tasks import (
    NAME,
    PATIENCE_SECONDS,
    QUEUE,
    a_worker,
    claim,
    complete,
    state,
    submit,
    until,
    until_states,
)

pytestmark = pytest.mark.every_rabbitmq


class Workshop:
    """
    Creates transports, and sends hints as the relay would, or as it never would.
    """

    def __init__(self, db: Database, broker_url: str) -> None:
        self.db = db
        self.broker_url = broker_url
        self.cleanup = AsyncExitStack()

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Channel]:
        """
        A channel for one block, on a separate connection.
        """
        connection = await connect(self.broker_url, name="test")
        try:
            yield await connection.channel()
        finally:
            await connection.close()

    async def declare(self, queue: str) -> None:
        """
        Declare a task queue before any worker exists.
        """
        async with self.channel() as channel:
            await declare_dead_letters(channel)
            await declare_task_queue(channel, queue)

    async def taker(
        self,
        *,
        names: Sequence[str] = (NAME,),
        queues: Sequence[str] = (QUEUE,),
        slots: int = 1,
        times: Times = TIMES,
    ) -> RabbitTransport:
        """
        A transport of a live worker.
        """
        worker = await a_worker(self.db, names=names, queues=queues, slots=slots)
        offers = [Offer(name, 5, 900.0) for name in names]
        claimant = Claimant(worker.id, tuple(queues), offers)
        transport = RabbitTransport(self.db, claimant, broker_url=self.broker_url, times=times)
        await transport.open()
        self.cleanup.push_async_callback(transport.close)
        return transport

    async def send(self, *bodies: bytes | UUID | Sequence[UUID], queue: str = QUEUE) -> None:
        """
        Put messages into a task queue: a hint, a pack of hints, or anything else.
        """
        messages = [Message(broker_queue(queue), as_body(body)) for body in bodies]
        async with self.channel() as channel:
            await channel.confirm_select()
            results = await channel.publish(messages, exchange="", timeout_seconds=10)
        assert {PublishResult.CONFIRMED} == set(results)

    async def ready(self, queue: str = broker_queue(QUEUE)) -> int:
        """
        Number of ready messages in a queue.
        """
        async with self.channel() as channel:
            counts = await channel.inspect_queue(queue)
        return -1 if counts is None else counts.messages

    async def until_ready(self, count: int, queue: str = broker_queue(QUEUE)) -> None:
        """
        Wait until a queue holds exactly this many ready messages.
        """

        async def as_many() -> bool:
            return await self.ready(queue) == count

        await until(as_many)


def as_body(content: bytes | UUID | Sequence[UUID]) -> bytes:
    """
    The message body that the relay would write.
    """
    if isinstance(content, bytes):
        return content
    return encode_hints([content] if isinstance(content, UUID) else content)


@pytest.fixture
async def workshop(db: Database, broker_url: str) -> AsyncIterator[Workshop]:
    """
    A workshop with its queue declared; no relay runs.
    """
    workshop = Workshop(db, broker_url)
    await workshop.declare(QUEUE)
    async with workshop.cleanup:
        yield workshop


@pytest.fixture
async def relay(db: Database, broker_url: str) -> AsyncIterator[None]:
    """
    A running relay.
    """
    relaying = asyncio.create_task(Relay(db, broker_url).run())
    yield
    relaying.cancel()
    await asyncio.gather(relaying, return_exceptions=True)


async def take(taker: RabbitTransport, slots: int = 1, *, window: int | None = None) -> list[Claim]:
    """
    Call `take`, with a time limit.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await taker.take(slots, window=window or slots)


async def work_off(
    taker: RabbitTransport, db: Database, taken: Counter[UUID], *, slots: int
) -> None:
    """
    Take, complete and finish tasks until the taker is stopped.
    """
    while claims := await taker.take(slots, window=slots):
        taken.update(claim.task_id for claim in claims)
        await complete(db, claims)
        for done in claims:
            taker.let_go(done)


async def test_a_hint_sent_many_times_runs_its_task_once(workshop: Workshop) -> None:
    """
    Duplicate hints are dropped, within one batch and after it.
    """
    task_id, other, last = await submit(workshop.db, 3)
    # Once the last hint is used, those before it are used up.
    await workshop.send(*[task_id] * 5, other, *[task_id] * 5, last)
    taker = await workshop.taker(slots=20)
    taken: Counter[UUID] = Counter()
    working = asyncio.create_task(work_off(taker, workshop.db, taken, slots=20))

    await until_states(workshop.db, completed=3)
    await taker.stop()
    await working
    await taker.close()

    assert {task_id: 1, other: 1, last: 1} == taken
    assert 0 == await workshop.ready()


async def test_a_pack_brings_all_its_tasks_and_is_kept_until_the_last_is_finished(
    workshop: Workshop,
) -> None:
    """
    If a worker dies before the last task of a pack is finished, RabbitMQ redelivers the whole
    message, however its tasks were claimed.
    """
    ids = await submit(workshop.db, PACK_MAX)
    await workshop.send(ids)
    dying = await workshop.taker(slots=PACK_MAX)
    mine: list[Claim] = []
    while len(mine) < PACK_MAX:
        mine += await take(dying, 7, window=PACK_MAX)
    await complete(workshop.db, mine)
    for done in mine[1:]:
        dying.let_go(done)

    await dying.close()

    assert sorted(ids) == sorted(claim.task_id for claim in mine)
    await workshop.until_ready(1)


async def test_a_pack_whose_tasks_are_all_finished_is_gone(workshop: Workshop) -> None:
    """
    After the last `finished`, nothing of a pack is left in the broker.
    """
    await workshop.send(await submit(workshop.db, 3))
    taker = await workshop.taker(slots=3)

    for done in await take(taker, 3):
        taker.let_go(done)
    await taker.close()

    assert 0 == await workshop.ready()


async def test_a_task_in_several_packs_runs_once(workshop: Workshop) -> None:
    """
    A task that is twice in one pack, in two packs and in its own message runs once, and every
    message is used up in the end.
    """
    a, b, c, last = await submit(workshop.db, 4)
    # Once the last hint is used, those before it are used up.
    await workshop.send([a, b], [b, c], [a, a, uuid4()], c, last)
    taker = await workshop.taker(slots=2)
    taken: Counter[UUID] = Counter()
    working = asyncio.create_task(work_off(taker, workshop.db, taken, slots=2))

    await until_states(workshop.db, completed=4)
    await taker.stop()
    await working
    await taker.close()

    assert {a: 1, b: 1, c: 1, last: 1} == taken
    assert 0 == await workshop.ready()


async def test_what_waits_in_a_pack_for_a_slot_goes_to_another_worker(workshop: Workshop) -> None:
    """
    Slow tasks in one pack do not wait for each other while other workers are idle.
    """
    ids = await submit(workshop.db, 3)
    await workshop.send(ids)
    busy = await workshop.taker()
    [mine] = await take(busy)

    idle = await workshop.taker(slots=2)
    theirs: list[Claim] = []
    while len(theirs) < 2:
        theirs += await take(idle, 2 - len(theirs), window=2)

    assert sorted(ids) == sorted(claim.task_id for claim in [mine, *theirs])
    assert [True, True, True] == await complete(workshop.db, [mine, *theirs])
    for done in theirs:
        idle.let_go(done)
    await idle.stop()
    busy.let_go(mine)
    await busy.close()
    await idle.close()
    assert 0 == await workshop.ready()


async def test_stop_hands_back_a_pack_as_a_whole(workshop: Workshop) -> None:
    """
    After `stop` the running tasks of a pack continue here; the next worker to get the message
    claims only the rest.
    """
    ids = await submit(workshop.db, 4)
    await workshop.send(ids)
    leaving = await workshop.taker(slots=4)
    [mine] = await take(leaving, 1, window=4)

    await leaving.stop()
    heir = await workshop.taker(slots=4)
    theirs = await take(heir, 4)

    assert set(ids) - {mine.task_id} == {claim.task_id for claim in theirs}
    assert [True] == await complete(workshop.db, [mine])
    leaving.let_go(mine)
    await leaving.close()
    for done in theirs:
        heir.let_go(done)
    await heir.close()
    assert 0 == await workshop.ready()


async def test_a_worker_takes_fewer_packs_than_single_hints(workshop: Workshop) -> None:
    """
    A worker's prefetch is counted in tasks, so the remaining packs stay in the broker for others.
    """
    window = 2 * PACK_MAX
    nothing_goes_back = Times(wait_max=PATIENCE_SECONDS)
    taker = await workshop.taker(slots=window, times=nothing_goes_back)
    await workshop.send(await submit(workshop.db, PACK_MAX))
    for done in await take(taker, window):  # The worker learns that packs are arriving.
        taker.let_go(done)

    await workshop.send(*[await submit(workshop.db, PACK_MAX) for _ in range(20)])
    taken = 0
    while taken < window:
        taken += len(await take(taker, window - taken, window=window))

    packs = Prefetch(hints_per_message=PACK_MAX).wanted(window)
    assert 20 - 2 * packs <= await workshop.ready()


def test_a_prefetch_is_as_many_messages_as_bring_a_window_of_hints() -> None:
    """
    The prefetch is exactly the window for single hints, and one more for packs, whose last hint
    keeps the whole message unacknowledged; it is 0 only without a window.
    """
    single, pack = Prefetch(), Prefetch(hints_per_message=50)

    assert [0, 1, 10, 1_000] == [single.wanted(window) for window in (0, 1, 10, 1_000)]
    assert [0, 1, 1, 21] == [pack.wanted(window) for window in (0, 1, 10, 1_000)]


def test_a_consumer_learns_immediately_that_packs_come_and_soon_that_they_stopped() -> None:
    """
    A worker is neither flooded by packs nor starved when single hints follow them.
    """
    prefetch = Prefetch(messages=10)
    prefetch.observe(50)
    assert 50 == prefetch.hints_per_message
    assert prefetch.is_far_from(10)

    for _ in range(6):
        prefetch.observe(1)

    assert 1 == prefetch.hints_per_message


async def test_messages_that_are_no_ids_are_parked_and_cost_nothing_else(
    workshop: Workshop,
) -> None:
    """
    Garbage is parked where a person can inspect it; the hints around it are served.
    """
    ids = await submit(workshop.db, 2)
    garbage = [
        b"",
        b"\x00" * 36,
        b"not an id",
        "\N{SNOWMAN}".encode() * 12,
        str(ids[0]).encode() + b" ",
        b"{" + str(ids[0]).encode()[1:],
        ids[0].bytes,
        encode_hints([ids[0]]) + b"\n",
        encode_hints([ids[0]]) + b"\n\n" + encode_hints([ids[1]]),
        encode_hints([ids[0]]) + b"\n" + b"x" * 36,
        encode_hints([uuid4() for _ in range(PACK_MAX + 1)]),
        b"x" * 2_000_000,
    ]
    await workshop.send(ids[0], *garbage, ids[1])
    taker = await workshop.taker(slots=4)

    taken: list[UUID] = []
    while len(taken) < 2:
        taken += [claim.task_id for claim in await take(taker, 4)]

    assert sorted(ids) == sorted(taken)
    await workshop.until_ready(len(garbage), unreadable())


async def test_hints_of_tasks_that_do_not_exist_are_dropped(workshop: Workshop) -> None:
    """
    Hints with another system's ids, or those of pruned tasks, do no harm and are not redelivered.
    """
    [task_id] = await submit(workshop.db)
    await workshop.send(*[uuid4() for _ in range(50)], task_id)
    taker = await workshop.taker(slots=4)

    [mine] = await take(taker, 4)

    assert task_id == mine.task_id
    taker.let_go(mine)
    await taker.close()
    assert 0 == await workshop.ready()


async def test_a_forged_hint_starts_no_task_early(workshop: Workshop) -> None:
    """
    A message cannot start a task that is not due, finished, running elsewhere, or paused.
    """
    [later] = await submit(workshop.db, delay_seconds=1_000)
    [finished] = await submit(workshop.db)
    worker = await a_worker(workshop.db)
    await complete(workshop.db, await claim(workshop.db, worker.id))
    [running] = await submit(workshop.db)
    await claim(workshop.db, worker.id)
    await queues.pause(workshop.db, "paused")
    [paused] = await submit(workshop.db, queue="paused")
    [now] = await submit(workshop.db)
    await workshop.send(later, finished, running, paused, now)
    taker = await workshop.taker(slots=8)

    [mine] = await take(taker, 8)

    assert now == mine.task_id
    assert ["pending", "completed", "running", "pending"] == [
        await state(workshop.db, task_id) for task_id in (later, finished, running, paused)
    ]


async def test_a_hint_for_a_name_not_offered_gives_the_task_back(workshop: Workshop) -> None:
    """
    A queued task whose hint reaches the wrong worker becomes pending, and so is sent again.
    """
    [task_id] = await submit(workshop.db, name="special")
    await workshop.db.execute(
        "UPDATE asyncflow.tasks SET state = 'queued', queued_at = now() WHERE id = $1", task_id
    )
    await workshop.send(task_id)
    taker = await workshop.taker()
    waiting = asyncio.create_task(take(taker))

    await until_states(workshop.db, pending=1)

    await workshop.until_ready(0)
    await taker.stop()
    assert [] == await waiting


async def test_a_hint_is_kept_by_the_broker_until_its_attempt_is_finished(
    workshop: Workshop,
) -> None:
    """
    If a worker dies, RabbitMQ redelivers its hints.
    """
    [task_id] = await submit(workshop.db)
    await workshop.send(task_id)
    dying = await workshop.taker()
    await take(dying)
    assert 0 == await workshop.ready()

    await dying.close()

    await workshop.until_ready(1)


async def test_a_finished_hint_is_gone(workshop: Workshop) -> None:
    """
    After `finished`, nothing of a hint is left in the broker.
    """
    [task_id] = await submit(workshop.db)
    await workshop.send(task_id)
    taker = await workshop.taker()
    [mine] = await take(taker)

    taker.let_go(mine)
    await taker.close()

    assert 0 == await workshop.ready()


async def test_stop_hands_back_exactly_what_was_not_claimed(workshop: Workshop) -> None:
    """
    While its attempts finish, a stopping worker holds nothing that others could run.
    """
    ids = await submit(workshop.db, 8)
    await workshop.send(*ids)
    taker = await workshop.taker(slots=8)
    [mine] = await take(taker, 1, window=8)

    await taker.stop()

    await workshop.until_ready(7)
    taker.let_go(mine)
    await taker.close()
    assert 7 == await workshop.ready()


async def test_a_hint_that_finds_no_slot_goes_to_another_worker(workshop: Workshop) -> None:
    """
    If a worker of two queues with one slot gets a hint from each, the other hint goes to another
    worker.
    """
    await workshop.declare("second")
    [first] = await submit(workshop.db)
    [second] = await submit(workshop.db, queue="second")
    await workshop.send(first)
    await workshop.send(second, queue="second")
    busy = await workshop.taker(queues=[QUEUE, "second"])
    [mine] = await take(busy)

    idle = await workshop.taker(queues=[QUEUE, "second"])
    [theirs] = await take(idle)

    assert {first, second} == {mine.task_id, theirs.task_id}


async def test_a_worker_that_gave_hints_back_takes_again_when_it_has_a_slot(
    workshop: Workshop,
) -> None:
    """
    A worker resumes consuming after it returned hints for lack of a slot.
    """
    await workshop.declare("second")
    ids = await submit(workshop.db, 1) + await submit(workshop.db, 1, queue="second")
    await workshop.send(ids[0])
    await workshop.send(ids[1], queue="second")
    taker = await workshop.taker(queues=[QUEUE, "second"])
    [mine] = await take(taker)
    rest = broker_queue("second" if mine.task_id == ids[0] else QUEUE)
    await workshop.until_ready(1, rest)

    await complete(workshop.db, [mine])
    taker.let_go(mine)
    [other] = await take(taker)

    assert set(ids) == {mine.task_id, other.task_id}


async def test_a_long_attempt_is_acknowledged_early(workshop: Workshop) -> None:
    """
    The hint of a long attempt is acknowledged before RabbitMQ's consumer timeout; from then on the
    lease alone protects it.
    """
    ids = await submit(workshop.db, 2)
    await workshop.send(*ids)
    taker = await workshop.taker(times=Times(early_ack=0.1))
    [slow] = await take(taker)

    # Its hint no longer counts, so the broker sends the next one; there is a slot for it.
    [other] = await take(taker)
    taker.let_go(slow)
    await taker.close()

    assert set(ids) == {slow.task_id, other.task_id}
    assert 1 >= await workshop.ready()


async def test_hints_may_go_back_any_number_of_times(workshop: Workshop) -> None:
    """
    RabbitMQ's delivery limit, 20 by default, is off: a hint that was returned 40 times, by nacks
    and by broken connections, is still delivered.
    """
    [task_id] = await submit(workshop.db)
    await workshop.send(task_id)
    for _ in range(30):
        await give_back_by_nack(workshop)
    for _ in range(10):
        await give_back_by_closing(workshop)

    taker = await workshop.taker()
    [mine] = await take(taker)

    assert task_id == mine.task_id


async def give_back_by_nack(workshop: Workshop) -> None:
    """
    Receive the only hint and nack it.
    """
    async with workshop.channel() as channel:
        [delivery], tag = await receive(channel)
        await channel.cancel(tag)
        channel.nack(delivery.tag, requeue=True)


async def give_back_by_closing(workshop: Workshop) -> None:
    """
    Receive the only hint and close the connection.
    """
    async with workshop.channel() as channel:
        await receive(channel)


async def receive(channel: Channel) -> tuple[list[Delivery], str]:
    """
    Wait for deliveries; return them and the consumer's tag.
    """
    delivered: asyncio.Queue[list[Delivery]] = asyncio.Queue()
    tag = await channel.consume(
        broker_queue(QUEUE),
        prefetch=1,
        on_deliveries=delivered.put_nowait,
        on_cancelled=channel.abandon,
    )
    return await delivered.get(), tag


async def test_a_claim_that_cannot_be_made_now_gives_its_hint_back(
    workshop: Workshop, postgres_server: PostgresServer
) -> None:
    """
    A claim that cannot be made while the database is down returns its hint.
    """
    ids = await submit(workshop.db, 3)
    taker = await workshop.taker(slots=3)
    waiting = asyncio.create_task(take(taker, 3))
    postgres_server.cluster.stop()
    await workshop.send(*ids)

    async def were_given_back() -> bool:
        async with workshop.channel() as channel:
            deliveries, _ = await receive(channel)
        return deliveries[0].redelivered

    await until(were_given_back)
    postgres_server.cluster.start()

    taken = await waiting
    while len(taken) < 3:
        taken += await take(taker, 3)
    assert sorted(ids) == sorted(claim.task_id for claim in taken)


async def test_a_connection_the_broker_closed_is_replaced(
    workshop: Workshop, broker: Broker
) -> None:
    """
    After an operator closes every connection, the waiting worker reconnects on its own.
    """
    taker = await workshop.taker()
    await workshop.send(*await submit(workshop.db))
    taker.let_go(*await take(taker))
    waiting = asyncio.create_task(take(taker))
    await close_connections(broker, workshop.broker_url)

    [task_id] = await submit(workshop.db)
    await workshop.send(task_id)

    [mine] = await waiting
    assert task_id == mine.task_id


async def close_connections(broker: Broker, broker_url: str) -> None:
    """
    Have the broker close every connection of a virtual host.
    """
    vhost = urlsplit(broker_url).path[1:]
    closing = ("close_all_connections", "--vhost", vhost, "for a test")
    await asyncio.to_thread(broker.ctl, *closing)


async def test_after_a_reconnect_a_running_attempt_is_not_given_away(
    workshop: Workshop, broker: Broker
) -> None:
    """
    The redelivered hint of a running task meets a live lease and is dropped.
    """
    [slow] = await submit(workshop.db)
    await workshop.send(slow)
    taker = await workshop.taker(slots=2)
    [mine] = await take(taker, 1, window=2)
    await close_connections(broker, workshop.broker_url)
    [other] = await submit(workshop.db)
    await workshop.send(other)

    [theirs] = await take(taker, 1, window=2)
    assert other == theirs.task_id
    taker.let_go(mine)
    assert [True] == await complete(workshop.db, [mine])


async def test_a_deleted_queue_is_declared_and_consumed_again(
    workshop: Workshop, relay: None
) -> None:
    """
    A worker whose queue is deleted declares and consumes it again, since the broker has cancelled
    its consumer.
    """
    taker = await workshop.taker()
    await submit(workshop.db)
    [first] = await take(taker)
    taker.let_go(first)
    waiting = asyncio.create_task(take(taker))

    async with workshop.channel() as channel:
        await channel.delete_queue(broker_queue(QUEUE))
    [task_id] = await submit(workshop.db)

    [mine] = await waiting
    assert task_id == mine.task_id


async def test_a_crashed_broker_costs_time_and_no_task(
    db: Database, broker_url: str, broker: Broker, workshop: Workshop, relay: None
) -> None:
    """
    After RabbitMQ is killed and comes back, relay and worker continue, and no task is lost.
    """
    taker = await workshop.taker()
    await submit(workshop.db)
    [first] = await take(taker)
    waiting = asyncio.create_task(take(taker))
    # RabbitMQ persists a new queue half a second late; killed before that, it comes back with a
    # queue that never answers.
    await asyncio.sleep(1.5)

    await asyncio.to_thread(broker.kill)
    [task_id] = await submit(workshop.db)
    await asyncio.to_thread(broker.start)

    [mine] = await waiting
    assert task_id == mine.task_id
    taker.let_go(first)


@pytest.mark.any_rabbitmq
async def test_a_broker_that_comes_up_late_is_waited_for(
    workshop: Workshop, broker: Broker, relay: None
) -> None:
    """
    A worker may start while RabbitMQ is down.
    """
    await asyncio.to_thread(broker.stop)
    taker = await workshop.taker()
    waiting = asyncio.create_task(take(taker))
    [task_id] = await submit(workshop.db)

    await asyncio.to_thread(broker.start)

    [mine] = await waiting
    assert task_id == mine.task_id


@pytest.mark.any_rabbitmq
async def test_stop_and_close_need_no_broker(workshop: Workshop, broker: Broker) -> None:
    """
    A worker can leave while RabbitMQ is down.
    """
    taker = await workshop.taker()
    waiting = asyncio.create_task(take(taker))
    await asyncio.to_thread(broker.stop)

    async with asyncio.timeout(10):
        await taker.stop()
        assert [] == await waiting
        await taker.close()

    await asyncio.to_thread(broker.start)


async def test_ten_thousand_tasks_are_each_claimed_once_and_leave_nothing_behind(
    workshop: Workshop, relay: None
) -> None:
    """
    Ten thousand tasks go through relay and broker to three workers, each is claimed once, and in
    the end the queue is empty.
    """
    takers = [await workshop.taker(slots=100) for _ in range(3)]
    taken: Counter[UUID] = Counter()
    working = [
        asyncio.create_task(work_off(taker, workshop.db, taken, slots=100)) for taker in takers
    ]
    ids = [task_id for _ in range(10) for task_id in await submit(workshop.db, 1_000)]

    await until_states(workshop.db, completed=10_000)
    for taker in takers:
        await taker.stop()
    await asyncio.gather(*working)
    for taker in takers:
        await taker.close()

    assert Counter(ids) == taken
    assert 0 == await workshop.ready()


@pytest.mark.any_rabbitmq
async def test_one_unusable_queue_does_not_stop_the_others(
    db: Database, workshop: Workshop, relay: None
) -> None:
    """
    Relay and worker serve the other queues, and the unusable one without a restart once it is
    fixed.
    """
    bad = "a-bad-one"
    async with workshop.channel() as channel:
        await channel.declare_queue(broker_queue(bad))  # Of another type than ours.
    taker = await workshop.taker(queues=[bad, QUEUE], slots=4)
    [good_task] = await submit(db)
    [bad_task] = await submit(db, queue=bad)

    assert [good_task] == [claim.task_id for claim in await take(taker, slots=4)]

    async with workshop.channel() as channel:
        await channel.delete_queue(broker_queue(bad))
    assert [bad_task] == [claim.task_id for claim in await take(taker, slots=4)]
