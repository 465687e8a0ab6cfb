"""
The relay sends admissible tasks, in the right order and in small amounts, and nothing gets lost
between PostgreSQL and RabbitMQ, whatever breaks.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from structlog.testing import capture_logs

from asyncflow.domain.states import Event
from asyncflow.errors import StoreUnavailable
from asyncflow.relay import feed
from asyncflow.relay.relay import Relay
from asyncflow.relay.sending import BATCH
from asyncflow.relay.times import TIMES, Times
from asyncflow.relay.window import REST_SECONDS_MIN, SIZE_MIN
from asyncflow.store import claims, hints, queues
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.due import LowWaterMark
from asyncflow.store.leadership import leadership
from asyncflow.transport.amqp import (
    Channel,
    Delivery,
    Message,
    PublishResult,
    QueueCounts,
    connect,
)
from asyncflow.transport.rabbitmq.message import decode_hints
from asyncflow.transport.rabbitmq.queue_backoff import BackoffTimes
from asyncflow.transport.rabbitmq.topology import broker_queue, declare_dead_letters
from tests.support.broker import Broker
from tests.support.builders import SETTLEMENTS, settled
from tests.support.tasks import (
    NAME,
    PATIENCE_SECONDS,
    QUEUE,
    a_worker,
    complete,
    cut_every_connection,
    database,
    states,
    submit,
    until,
    until_states,
)


@pytest.fixture
async def channel(broker_url: str) -> AsyncIterator[Channel]:
    """
    A channel like the relay's.
    """
    connection = await connect(broker_url, name="test")
    channel = await connection.channel()
    await declare_dead_letters(channel)
    await channel.confirm_select()
    yield channel
    await connection.close()


class Clock:
    """
    A monotonic clock that can be advanced.
    """

    def __init__(self) -> None:
        self._ahead_seconds = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self._ahead_seconds

    def advance(self, seconds: float) -> None:
        """
        Advance the clock.
        """
        self._ahead_seconds += seconds


@pytest.fixture
def clock() -> Clock:
    """
    The relay's clock.
    """
    return Clock()


@pytest.fixture
def times() -> Times:
    """
    The relay's times, unless a test parametrizes them.
    """
    return TIMES


@pytest.fixture
def relay(db: Database, broker_url: str, times: Times, clock: Clock) -> Relay:
    """
    A relay that sends when told to.
    """
    return Relay(db, broker_url, times=times, clock=clock)


lost_at_once = pytest.mark.parametrize("times", [Times(lost_after=0.0)], ids=["lost-at-once"])
"""A queued task without a message counts as lost in the next round."""

marked_at_once = pytest.mark.parametrize(
    "times", [Times(lost_after=0.0, mark_after=0.0)], ids=["marked-at-once"]
)
"""In addition, what was sent in a pack in one round is marked in the next."""


async def ready(channel: Channel) -> int:
    """
    Number of hints that RabbitMQ holds for the default queue.
    """
    counts = await channel.inspect_queue(broker_queue(QUEUE))
    return counts.messages if counts else 0


async def claim_hinted(db: Database, count: int) -> int:
    """
    Run queued tasks to their end, as if their hints had arrived; return how many there were.
    """
    worker = await a_worker(db)
    rows = await db.fetch(
        "SELECT id FROM asyncflow.tasks WHERE state = 'queued' ORDER BY queued_at LIMIT $1", count
    )
    taken = await claims.claim_hinted(
        db,
        [row["id"] for row in rows],
        lease_id=uuid4(),
        worker_id=worker.id,
        offers=[Offer(NAME, 5, 900.0)],
    )
    return sum(await complete(db, taken))


async def test_the_window_is_filled_by_priority(
    db: Database, channel: Channel, relay: Relay
) -> None:
    """
    An urgent task submitted last does not wait behind a backlog.
    """
    await a_worker(db)
    await submit(db, 100, priority=0)
    await submit(db, 10, priority=9)

    assert TIMES.poll > await relay.run_once(db, channel)

    rows = await db.fetch(
        "SELECT priority, count(*) FROM asyncflow.tasks WHERE state = 'queued' GROUP BY priority"
    )
    assert {9: 10, 0: SIZE_MIN - 10} == {row["priority"]: row["count"] for row in rows}
    assert SIZE_MIN == await ready(channel)


async def test_a_full_window_admits_nothing_more(
    db: Database, channel: Channel, relay: Relay
) -> None:
    """
    With a full window the backlog waits in PostgreSQL, where priority and pause still affect it.
    """
    await a_worker(db)
    await submit(db, 100)
    await relay.run_once(db, channel)

    await relay.run_once(db, channel)

    assert SIZE_MIN == await ready(channel)
    assert Counter(queued=SIZE_MIN, pending=100 - SIZE_MIN) == await states(db)


async def test_a_full_window_is_observed_less_and_less_often_until_it_is_used_up(
    db: Database, channel: Channel, relay: Relay
) -> None:
    """
    The pause between observations doubles while the window stays full, and is short again once the
    window is used up.
    """
    await a_worker(db)
    await submit(db, 100)
    rests = [await relay.run_once(db, channel)]
    while rests[-1] < TIMES.poll:
        await asyncio.sleep(rests[-1])
        rests.append(await relay.run_once(db, channel))

    assert sorted(rests) == rests
    assert [REST_SECONDS_MIN, 2 * REST_SECONDS_MIN, 4 * REST_SECONDS_MIN] == rests[:3]
    await run_hinted(db, channel)
    assert REST_SECONDS_MIN == await relay.run_once(db, channel)


async def test_a_relay_without_tasks_rests(db: Database, channel: Channel, relay: Relay) -> None:
    """
    A window that is not full is not observed again until something happens.
    """
    await a_worker(db)
    await submit(db, SIZE_MIN - 1)

    assert [TIMES.poll] * 3 == [await relay.run_once(db, channel) for _ in range(3)]


async def test_a_relay_begins_at_the_low_water_mark(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The relay starts at the low-water mark of its open queues and the names offered there.
    """
    asked: list[dict[str, Any]] = []

    def never(self: LowWaterMark, **what: Any) -> Any:
        asked.append(what)
        return {QUEUE: [datetime.max.replace(tzinfo=UTC)] * 10}

    await a_worker(db)
    await submit(db)
    with monkeypatch.context() as patched:
        patched.setattr(LowWaterMark, "since", never)
        await relay.run_once(db, channel)

    assert [{"queues": [QUEUE], "names": [NAME]}] == asked
    assert Counter(pending=1) == await states(db)
    await relay.run_once(db, channel)
    assert Counter(queued=1) == await states(db)


@lost_at_once
async def test_queued_tasks_are_counted_from_the_beginning_once_a_minute(
    db: Database, channel: Channel, relay: Relay, clock: Clock
) -> None:
    """
    Between full counts, tasks are counted from the oldest known one, so a lost hint of an older
    task is found within a minute.
    """
    await a_worker(db)
    await submit(db, 3)
    await relay.run_once(db, channel)
    await channel.purge_queue(broker_queue(QUEUE))
    await db.execute("UPDATE asyncflow.tasks SET queued_at = now() - interval '1 hour'")

    await relay.run_once(db, channel)
    assert 0 == await ready(channel)
    clock.advance(TIMES.recount)
    await relay.run_once(db, channel)

    assert 3 == await ready(channel)


async def test_what_may_not_go_stays_pending(db: Database, channel: Channel, relay: Relay) -> None:
    """
    A task stays pending if it is not due, if its queue is paused, or if no live worker serves its
    name or queue.
    """
    await a_worker(db, queues=[QUEUE, "paused"])
    await queues.pause(db, "paused")
    await submit(db, delay_seconds=1_000)
    await submit(db, queue="paused")
    await submit(db, name="unoffered")
    await submit(db, queue="unserved")

    assert TIMES.poll == await relay.run_once(db, channel)

    assert Counter(pending=4) == await states(db)


async def test_a_crash_between_publish_and_mark_repeats_hints_and_loses_none(
    db: Database, channel: Channel, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The next relay sends unmarked hints again, so a crash repeats hints and loses none.
    """
    await a_worker(db)
    await submit(db, 5)

    async def crash(db: Any, sent: Sequence[Any]) -> None:
        raise StoreUnavailable("crashed")

    with monkeypatch.context() as patched:
        patched.setattr(hints, "mark_queued", crash)
        with pytest.raises(StoreUnavailable):
            await Relay(db, broker_url).run_once(db, channel)
    assert Counter(pending=5) == await states(db)
    assert 5 == await ready(channel)

    await Relay(db, broker_url).run_once(db, channel)

    assert Counter(queued=5) == await states(db)
    assert 10 == await ready(channel)


async def test_a_database_that_takes_no_marks_causes_no_flood_of_hints(
    db: Database, channel: Channel, broker_url: str, database_url: str
) -> None:
    """
    While PostgreSQL is read-only or full and sent tasks cannot be marked, they are not sent again
    with every retry.
    """
    name = urlsplit(database_url).path[1:]
    await a_worker(db)
    await submit(db, 100)
    await db.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with database(database_url) as demoted:
        relay = Relay(demoted, broker_url)

        for _ in range(5):
            with pytest.raises(StoreUnavailable):
                await relay.run_once(demoted, channel)

        assert SIZE_MIN == await ready(channel)
        await db.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        await relay.run_once(demoted, channel)
    assert Counter(queued=SIZE_MIN, pending=100 - SIZE_MIN) == await states(db)
    assert SIZE_MIN == await ready(channel)


async def test_hints_that_the_broker_refuses_stay_pending(
    db: Database, channel: Channel, relay: Relay, broker: Broker, broker_url: str
) -> None:
    """
    A queue with a limit accepts what fits, and the rest is sent once there is room; the log names
    the policy.
    """
    await a_worker(db)
    await submit(db, SIZE_MIN)
    vhost = urlsplit(broker_url).path[1:]
    limit = {"max-length": 1, "overflow": "reject-publish"}
    policy = {"pattern": ".*", "definition": limit, "apply-to": "quorum_queues"}
    await relay.run_once(db, channel)
    await channel.purge_queue(broker_queue(QUEUE))
    await db.execute("UPDATE asyncflow.tasks SET state = 'pending', queued_at = NULL")
    broker.api("PUT", f"policies/{vhost}/limit", policy)
    logs: Any = ()

    async def some_refused() -> bool:
        # A queue over its limit refuses what comes next.
        await channel.purge_queue(broker_queue(QUEUE))
        over = [Message(broker_queue(QUEUE), b"")] * 2
        await channel.publish(over, exchange="", timeout_seconds=PATIENCE_SECONDS)
        await relay.run_once(db, channel)
        return any(event["event"] == "hints.not_sent" for event in logs)

    with capture_logs() as captured:
        logs = captured
        await until(some_refused)
    assert (await states(db))["pending"] > 0
    broker.api("DELETE", f"policies/{vhost}/limit")

    async def all_sent() -> bool:
        await channel.purge_queue(broker_queue(QUEUE))
        await relay.run_once(db, channel)
        return not (await states(db))["pending"]

    await until(all_sent)
    [refused] = [event for event in logs if event["event"] == "hints.not_sent"]
    assert "overflow reject-publish" in refused["reason"]


async def test_hints_that_no_queue_takes_stay_pending(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Hints returned because their queue has vanished stay pending.
    """
    await a_worker(db)
    await submit(db, 5)

    async def vanished(channel: Channel, queue: str, *, prefix: str) -> QueueCounts:
        return QueueCounts(0, 0)

    with monkeypatch.context() as patched:
        patched.setattr(feed, "declare_task_queue", vanished)
        assert TIMES.poll == await relay.run_once(db, channel)
    assert Counter(pending=5) == await states(db)

    await relay.run_once(db, channel)

    assert Counter(queued=5) == await states(db)


@lost_at_once
@pytest.mark.parametrize("loss", ["purge", "delete"])
async def test_lost_hints_are_sent_again(
    db: Database, channel: Channel, relay: Relay, loss: str
) -> None:
    """
    After a queue is purged or deleted in RabbitMQ, its hints are sent again: this costs time and no
    task.
    """
    await a_worker(db)
    await submit(db, 10)
    await relay.run_once(db, channel)
    assert 10 == await ready(channel)
    if loss == "purge":
        await channel.purge_queue(broker_queue(QUEUE))
    else:
        await channel.delete_queue(broker_queue(QUEUE))

    async def sent_again() -> bool:
        await relay.run_once(db, channel)
        return await ready(channel) == 10

    await until(sent_again)
    assert Counter(queued=10) == await states(db)


@lost_at_once
async def test_slow_workers_cause_no_storm_of_hints(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    However long hints wait in RabbitMQ, they do not count as lost and are not sent again.
    """
    sent = count_messages(channel, monkeypatch)
    await a_worker(db)
    await submit(db, 200)
    done = 0

    while done < 200:
        for _ in range(3):
            await relay.run_once(db, channel)
        await drop_one_hint(channel)
        done += await claim_hinted(db, 1)

    assert 1.2 * 200 >= sum(sent)


def count_messages(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """
    A list to which the size of each batch published on `channel` is appended.
    """
    sent: list[int] = []
    publish = channel.publish

    async def counting(messages: Sequence[Message], **more: Any) -> list[PublishResult]:
        sent.append(len(messages))
        return await publish(messages, **more)

    monkeypatch.setattr(channel, "publish", counting)
    return sent


async def drop_one_hint(channel: Channel) -> None:
    """
    Consume and acknowledge one hint, as the worker that runs its task would.
    """
    received: asyncio.Queue[list[Any]] = asyncio.Queue()
    tag = await channel.consume(
        broker_queue(QUEUE),
        prefetch=1,
        on_deliveries=received.put_nowait,
        on_cancelled=channel.abandon,
    )
    [delivery] = await received.get()
    await channel.cancel(tag)
    channel.ack(delivery.tag)


async def test_a_large_backlog_leaves_in_batches(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A publish never carries more than one batch, so no round trip takes long.
    """
    sent = count_messages(channel, monkeypatch)
    await a_worker(db, slots=BATCH)
    await submit(db, 2 * BATCH)

    await relay.run_once(db, channel)

    assert [BATCH, BATCH] == sent
    assert Counter(queued=2 * BATCH) == await states(db)


async def grow_window(db: Database, channel: Channel, relay: Relay) -> None:
    """
    Run short tasks as they arrive, until the relay sends packs of up to four.
    """
    await a_worker(db)
    await submit(db, 3 * SIZE_MIN)
    while await relay.run_once(db, channel) < TIMES.mark_after:
        await run_hinted(db, channel)
    await run_hinted(db, channel)


async def run_hinted(db: Database, channel: Channel) -> int:
    """
    Complete every task whose hint RabbitMQ holds; return how many.
    """
    worker = await a_worker(db)
    deliveries = await drain(channel, await ready(channel))
    hints = [task_id for delivery in deliveries for task_id in decode_hints(delivery.body) or ()]
    taken = await claims.claim_hinted(
        db, hints, lease_id=uuid4(), worker_id=worker.id, offers=[Offer(NAME, 5, 900.0)]
    )
    return sum(await complete(db, taken))


async def test_while_workers_drain_fast_hints_travel_in_packs(
    db: Database, channel: Channel, relay: Relay
) -> None:
    """
    While workers drain fast, one message carries several tasks, in order, never of two priorities.
    """
    await grow_window(db, channel, relay)
    low = await submit(db, 7, priority=0)
    high = await submit(db, 5, priority=9)

    await relay.run_once(db, channel)

    packs = [decode_hints(delivery.body) for delivery in await drain(channel, 4)]
    assert [high[:4], high[4:], low[:4], low[4:]] == packs


async def test_a_task_sent_in_a_pack_is_marked_only_if_no_worker_claims_it(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """
    A task sent in a pack is in flight and not sent twice; it is marked only if no worker claims it.
    """
    await grow_window(db, channel, relay)
    await submit(db, 12)
    sent = count_messages(channel, monkeypatch)

    for _ in range(3):
        await relay.run_once(db, channel)

    assert [3] == sent
    assert 12 == (await states(db))["pending"]
    assert 12 == await run_hinted(db, channel)
    await submit(db, 4)
    await relay.run_once(db, channel)
    clock.advance(TIMES.mark_after)
    await relay.run_once(db, channel)
    assert {"queued": 4} == {k: n for k, n in (await states(db)).items() if k != "completed"}


async def test_what_came_back_after_it_was_sent_is_sent_again(
    db: Database, channel: Channel, relay: Relay
) -> None:
    """
    A retried task needs another hint, although its first one is in flight.
    """
    worker = await a_worker(db)
    await grow_window(db, channel, relay)
    [task_id] = await submit(db, 1)
    await relay.run_once(db, channel)
    await drain(channel, 1)
    [claim] = await claims.claim_hinted(
        db, [task_id], lease_id=uuid4(), worker_id=worker.id, offers=[Offer(NAME, 5, 900.0)]
    )
    await settled(db, task_id, claim.lease_id, SETTLEMENTS[Event.RELEASE])

    await relay.run_once(db, channel)

    assert [[task_id]] == [decode_hints(delivery.body) for delivery in await drain(channel, 1)]


async def test_a_pause_uses_up_what_was_sent_before(
    db: Database, channel: Channel, relay: Relay
) -> None:
    """
    A worker that receives a hint during a pause releases it, so the task is sent again afterwards.
    """
    await grow_window(db, channel, relay)
    [task_id] = await submit(db, 1)
    await relay.run_once(db, channel)
    await queues.pause(db, QUEUE)
    assert 0 == await run_hinted(db, channel)
    await relay.run_once(db, channel)
    await queues.resume(db, QUEUE)

    await relay.run_once(db, channel)

    assert [[task_id]] == [decode_hints(delivery.body) for delivery in await drain(channel, 1)]


async def drain(channel: Channel, count: int) -> list[Delivery]:
    """
    Consume and acknowledge `count` messages.
    """
    received: asyncio.Queue[list[Delivery]] = asyncio.Queue()
    tag = await channel.consume(
        broker_queue(QUEUE),
        prefetch=0,
        on_deliveries=received.put_nowait,
        on_cancelled=channel.abandon,
    )
    deliveries: list[Delivery] = []
    while len(deliveries) < count:
        deliveries += await received.get()
    await channel.cancel(tag)
    if deliveries:
        channel.ack(deliveries[-1].tag, multiple=True)
    return deliveries


@marked_at_once
async def test_hints_that_wait_in_packs_are_not_taken_for_lost(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Fewer messages than queued tasks are not a loss where one message carries several tasks.
    """
    await grow_window(db, channel, relay)
    await submit(db, 12)
    await relay.run_once(db, channel)
    sent = count_messages(channel, monkeypatch)

    for _ in range(3):
        await relay.run_once(db, channel)

    assert 3 == await ready(channel)
    assert [] == sent
    assert 12 == (await states(db))["queued"]


@marked_at_once
async def test_another_leader_does_not_take_packs_for_lost(
    db: Database, channel: Channel, relay: Relay, broker_url: str, times: Times
) -> None:
    """
    A new leader does not count packs as lost, although it does not know their size.
    """
    await grow_window(db, channel, relay)
    await submit(db, 12)
    await relay.run_once(db, channel)
    await relay.run_once(db, channel)

    await Relay(db, broker_url, times=times).run_once(db, channel)

    assert 3 == await ready(channel)
    assert 12 == (await states(db))["queued"]


@marked_at_once
async def test_lost_packs_are_sent_again(db: Database, channel: Channel, relay: Relay) -> None:
    """
    Packs in a purged queue are sent again: an empty queue holds no hint, whatever its messages
    carried.
    """
    await grow_window(db, channel, relay)
    ids = await submit(db, 12)
    await relay.run_once(db, channel)
    await channel.purge_queue(broker_queue(QUEUE))

    # The relay marks what it has sent, and then detects the loss.
    await relay.run_once(db, channel)
    assert 12 == (await states(db))["queued"]
    await relay.run_once(db, channel)

    bodies = [decode_hints(delivery.body) or [] for delivery in await drain(channel, 3)]
    assert ids == [task_id for body in bodies for task_id in body]


@marked_at_once
async def test_some_lost_among_packs_are_found_although_a_backlog_lasts(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """
    Packs hide a loss for a while, but not for as long as the backlog lasts.
    """
    await grow_window(db, channel, relay)
    await submit(db, 12)
    await relay.run_once(db, channel)
    await drain(channel, 1)
    await relay.run_once(db, channel)
    assert 12 == (await states(db))["queued"]

    clock.advance(TIMES.packs_remembered)
    sent = count_messages(channel, monkeypatch)
    await relay.run_once(db, channel)

    assert sum(sent) >= 1


async def test_a_pack_that_no_queue_takes_leaves_all_its_tasks_pending(
    db: Database, channel: Channel, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A returned message counts as returned for each of its hints.
    """
    await grow_window(db, channel, relay)
    await submit(db, 12)
    await channel.delete_queue(broker_queue(QUEUE))

    async def vanished(channel: Channel, queue: str, *, prefix: str) -> QueueCounts:
        return QueueCounts(0, 0)

    monkeypatch.setattr(feed, "declare_task_queue", vanished)
    await relay.run_once(db, channel)

    assert 12 == (await states(db))["pending"]


async def test_a_running_relay_sends_a_new_task_immediately(db: Database, broker_url: str) -> None:
    """
    A new task wakes the relay, which does not wait for its next poll.
    """
    await a_worker(db)
    relaying = asyncio.create_task(Relay(db, broker_url).run())
    await submit(db)
    await until_states(db, queued=1)

    loop = asyncio.get_running_loop()
    began = loop.time()
    await submit(db)
    await until_states(db, queued=2)

    assert TIMES.poll > loop.time() - began
    await stopped(relaying)


async def test_another_relay_takes_over_when_the_leaders_session_dies(
    db: Database, broker_url: str, database_url: str
) -> None:
    """
    Of two relays, one takes the lead after PostgreSQL ended every session.
    """
    await a_worker(db)
    relaying = [asyncio.create_task(Relay(db, broker_url).run()) for _ in range(2)]
    await submit(db)
    await until_states(db, queued=1)

    await cut_every_connection(database_url)
    async with database(database_url) as fresh:
        await submit(fresh)
    await until_states(db, queued=2)

    relaying[0].cancel()
    await submit(db)
    await until_states(db, queued=3)
    await stopped(*relaying)


async def test_a_frozen_leader_loses_the_lead(db: Database, broker_url: str) -> None:
    """
    PostgreSQL ends the session of a leader that is frozen but alive.
    """
    await a_worker(db)
    frozen = leadership(db, purpose="frozen relay", idle_seconds_max=0.5)
    assert await frozen.__aenter__() is not None
    relaying = asyncio.create_task(Relay(db, broker_url).run())

    await submit(db)

    await until_states(db, queued=1)
    await frozen.__aexit__(None, None, None)
    await stopped(relaying)


async def test_an_alarm_of_the_broker_is_waited_out(
    db: Database, channel: Channel, broker: Broker, broker_url: str
) -> None:
    """
    While RabbitMQ accepts no messages, the relay holds no transaction open and keeps its single
    connection rather than sending the same hints on new ones; afterwards it continues.
    """
    times = Times(call=0.2, backoff=BackoffTimes(reconnect_seconds=(0.0, 0.1)))
    await a_worker(db)
    await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0")
    with capture_logs() as logs:
        relaying = asyncio.create_task(Relay(db, broker_url, times=times).run())
        try:
            await submit(db, 3)
            for _ in range(30):  # Long enough for several failed tries.
                assert 1.0 > await oldest_transaction_seconds(db)
                await asyncio.sleep(0.1)
            assert Counter(pending=3) == await states(db)
        finally:
            await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.6")
        await until_states(db, queued=3)

    happened = Counter(line["event"] for line in logs)
    assert (1, 1) == (happened["broker.connected"], happened["broker.blocked"])
    assert 6 >= await ready(channel)
    await stopped(relaying)


async def test_a_relay_tells_why_it_cannot_send(
    db: Database, broker: Broker, broker_url: str
) -> None:
    """
    The relay reports why it cannot send while RabbitMQ is down, without a password, and nothing
    otherwise.
    """
    await a_worker(db)
    relay = Relay(db, broker_url)
    relaying = asyncio.create_task(relay.run())

    async def is_troubled() -> bool:
        return relay.trouble is not None

    async def is_well() -> bool:
        return relay.trouble is None

    await submit(db)
    await until_states(db, queued=1)
    assert relay.trouble is None
    await asyncio.to_thread(broker.stop)
    await until(is_troubled)
    assert "guest" not in str(relay.trouble)
    await asyncio.to_thread(broker.start)

    await until(is_well)
    await stopped(relaying)


async def oldest_transaction_seconds(db: Database) -> float:
    """
    Age of the oldest open transaction of another session in this database; 0 if there is none.
    """
    seconds = await db.fetchval(
        "SELECT extract(epoch FROM coalesce(max(clock_timestamp() - xact_start), '0'))::float8"
        "  FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return float(seconds)


async def stopped(*relaying: asyncio.Task[None]) -> None:
    """
    Stop relays and wait until they have released everything.
    """
    for task in relaying:
        task.cancel()
    await asyncio.gather(*relaying, return_exceptions=True)
