"""
What every transport guarantees, whatever carries the hints: one suite, run on each transport.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from uuid import UUID

import pytest

from asyncflow.domain.task import Claim
from asyncflow.relay.relay import Relay
from asyncflow.store import queues
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.transport import Claimant, Transport
from asyncflow.transport.postgres import PostgresTransport
from asyncflow.transport.rabbitmq.transport import RabbitTransport
from tests.support.postgres import PostgresServer
from tests.support.tasks import (
    NAME,
    PATIENCE_SECONDS,
    QUEUE,
    a_worker,
    complete,
    cut_every_connection,
    database,
    state,
    submit,
    until_states,
)


class Seam(ABC):
    """
    Creates transports of one kind, and closes them after the test.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self.cleanup = AsyncExitStack()

    async def taker(
        self, *, names: Sequence[str] = (NAME,), queues: Sequence[str] = (QUEUE,), slots: int = 1
    ) -> Transport:
        """
        A transport of a live worker.
        """
        worker = await a_worker(self.db, names=names, queues=queues, slots=slots)
        offers = [Offer(name, 5, 900.0) for name in names]
        transport = await self.open(Claimant(worker.id, tuple(queues), offers))
        self.cleanup.push_async_callback(transport.close)
        return transport

    @abstractmethod
    async def open(self, claimant: Claimant) -> Transport: ...


class PostgresSeam(Seam):
    async def open(self, claimant: Claimant) -> Transport:
        transport = PostgresTransport(self.db, claimant)
        await transport.open()
        return transport


class RabbitSeam(Seam):
    def __init__(self, db: Database, broker_url: str) -> None:
        super().__init__(db)
        self.broker_url = broker_url

    async def open(self, claimant: Claimant) -> Transport:
        transport = RabbitTransport(self.db, claimant, broker_url=self.broker_url)
        await transport.open()
        return transport


async def take(taker: Transport, slots: int = 1, *, window: int | None = None) -> list[Claim]:
    """
    Call `take`, with a time limit.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await taker.take(slots, window=window or slots)


async def take_ids(taker: Transport, count: int, *, slots: int = 1) -> list[UUID]:
    """
    Take until `count` tasks are claimed, as a worker with ever fewer free slots does; return their
    ids in that order.
    """
    taken: list[UUID] = []
    while len(taken) < count:
        free = min(slots, count - len(taken))
        taken += [claim.task_id for claim in await take(taker, free, window=slots)]
    return taken


class Conformance:
    """
    The guarantees. A subclass chooses the transport with its fixture `seam`.
    """

    async def test_a_due_task_is_claimed_as_it_was_submitted(self, seam: Seam) -> None:
        """
        A claim brings what the handler needs, and the row says which worker has it.
        """
        taker = await seam.taker()
        [task_id] = await submit(seam.db, payload='{"a": 1}')

        [claim] = await take(taker)

        assert (task_id, NAME, QUEUE, 1) == (
            claim.task_id,
            claim.name,
            claim.queue,
            claim.attempt,
        )
        assert '{"a": 1}' == claim.payload
        assert "running" == await state(seam.db, task_id)

    async def test_a_waiting_take_is_woken_by_a_new_task(self, seam: Seam) -> None:
        """
        A waiting taker gets a task that is submitted while it waits.
        """
        taker = await seam.taker()
        waiting = asyncio.create_task(take(taker))
        await asyncio.sleep(0)
        [task_id] = await submit(seam.db)

        [claim] = await waiting

        assert task_id == claim.task_id

    async def test_no_take_claims_more_than_its_slots(self, seam: Seam) -> None:
        """
        `slots` is a bound, even if a wider window brought more hints.
        """
        taker = await seam.taker(slots=10)
        await submit(seam.db, 30)

        sizes = [len(await take(taker, 3, window=10)) for _ in range(3)]

        assert all(1 <= size <= 3 for size in sizes)
        await until_running(seam, sum(sizes))

    async def test_of_many_takers_each_task_goes_to_one(self, seam: Seam) -> None:
        """
        Three competing takers claim every task once.
        """
        ids = await submit(seam.db, 300)
        takers = [await seam.taker(slots=20) for _ in range(3)]
        taken: Counter[UUID] = Counter()
        all_taken = asyncio.Event()

        async def work(taker: Transport) -> None:
            while claims := await taker.take(20, window=20):
                taken.update(claim.task_id for claim in claims)
                await complete(seam.db, claims)
                for claim in claims:
                    taker.let_go(claim)
                if len(taken) >= len(ids):
                    all_taken.set()

        working = [asyncio.create_task(work(taker)) for taker in takers]
        async with asyncio.timeout(PATIENCE_SECONDS):
            await all_taken.wait()
            for taker in takers:
                await taker.stop()
            await asyncio.gather(*working)

        assert Counter(ids) == taken
        await until_states(seam.db, completed=300)

    async def test_a_full_worker_leaves_tasks_to_others(self, seam: Seam) -> None:
        """
        Slow tasks are shared: no worker holds more than its window.
        """
        takers = [await seam.taker(slots=2) for _ in range(2)]
        ids = await submit(seam.db, 4)

        taken = [await take_ids(taker, 2, slots=2) for taker in takers]

        assert sorted(ids) == sorted(taken[0] + taken[1])

    async def test_a_task_that_is_not_due_is_left_alone(self, seam: Seam) -> None:
        """
        A task that is not due is not claimed.
        """
        taker = await seam.taker()
        [later] = await submit(seam.db, delay_seconds=1_000)
        [now] = await submit(seam.db)

        assert [now] == await take_ids(taker, 1)
        assert "pending" == await state(seam.db, later)

    async def test_a_delayed_task_comes_when_it_is_due(self, seam: Seam) -> None:
        """
        A delayed task is claimed when it is due, without a wake-up.
        """
        taker = await seam.taker()
        [task_id] = await submit(seam.db, delay_seconds=0.3)

        assert [task_id] == await take_ids(taker, 1)

    async def test_a_paused_queue_starts_nothing_until_it_is_resumed(self, seam: Seam) -> None:
        """
        A pause takes effect immediately, even for hints that RabbitMQ already holds; after a resume
        all of these tasks run.
        """
        taker = await seam.taker(queues=["paused", QUEUE])
        await queues.pause(seam.db, "paused")
        [held] = await submit(seam.db, queue="paused")
        [free] = await submit(seam.db)

        assert [free] == await take_ids(taker, 1)
        await queues.resume(seam.db, "paused")
        assert [held] == await take_ids(taker, 1, slots=2)

    async def test_a_task_goes_to_a_worker_that_offers_its_name(self, seam: Seam) -> None:
        """
        A task goes to a worker that offers its name, even if workers of different handlers share a
        queue.
        """
        generalist = await seam.taker()
        [special] = await submit(seam.db, name="special")
        [ordinary] = await submit(seam.db)
        assert [ordinary] == await take_ids(generalist, 1)

        specialist = await seam.taker(names=["special"])

        receiving = asyncio.create_task(take_ids(specialist, 1))
        rest = asyncio.create_task(generalist.take(1, window=2))
        assert [special] == await receiving
        await generalist.stop()
        assert [] == await rest

    async def test_a_higher_priority_goes_first(self, seam: Seam) -> None:
        """
        Among waiting tasks, the most urgent goes first.
        """
        [low] = await submit(seam.db, priority=0)
        [high] = await submit(seam.db, priority=9)
        [middle] = await submit(seam.db, priority=4)
        taker = await seam.taker()

        assert [high, middle, low] == await take_ids_one_by_one(seam, taker, 3)

    async def test_a_queue_with_a_backlog_does_not_starve_another(self, seam: Seam) -> None:
        """
        A worker of several queues serves all of them.
        """
        await submit(seam.db, 200, queue="busy")
        [rare] = await submit(seam.db, queue="rare")
        taker = await seam.taker(queues=["busy", "rare"])

        assert rare in await take_ids_one_by_one(seam, taker, 100)

    async def test_stop_ends_a_waiting_take_with_nothing(self, seam: Seam) -> None:
        """
        After `stop` a waiting take returns nothing, and so does every later one.
        """
        taker = await seam.taker()
        waiting = asyncio.create_task(take(taker))
        await asyncio.sleep(0)

        await taker.stop()

        assert [] == await waiting
        assert [] == await take(taker)

    async def test_after_a_stop_others_get_what_was_not_claimed(self, seam: Seam) -> None:
        """
        After a stop, the worker's unclaimed hints go to others; its claims stay its own.
        """
        ids = await submit(seam.db, 8)
        leaving = await seam.taker(slots=8)
        [mine] = await take(leaving, 1, window=8)

        await leaving.stop()
        heir = await seam.taker(slots=8)

        assert set(ids) - {mine.task_id} == set(await take_ids(heir, 7, slots=8))

    async def test_a_claim_survives_the_end_of_its_transport(self, seam: Seam) -> None:
        """
        Closing a transport releases no claim: only the lease decides.
        """
        [task_id] = await submit(seam.db)
        leaving = await seam.taker()
        assert [task_id] == await take_ids(leaving, 1)

        await leaving.close()
        heir = await seam.taker()
        [other] = await submit(seam.db)

        assert [other] == await take_ids(heir, 1)
        assert "running" == await state(seam.db, task_id)

    async def test_cut_sessions_of_the_database_are_replaced(
        self, seam: Seam, database_url: str
    ) -> None:
        """
        After PostgreSQL ends every session of a waiting worker, the worker continues.
        """
        taker = await seam.taker()
        await submit(seam.db)
        await take_ids_one_by_one(seam, taker, 1)
        waiting = asyncio.create_task(take(taker))

        await cut_every_connection(database_url)
        async with database(database_url) as fresh:
            [task_id] = await submit(fresh)

        [claim] = await waiting
        assert task_id == claim.task_id

    async def test_an_outage_of_the_database_is_waited_out(
        self, seam: Seam, postgres_server: PostgresServer
    ) -> None:
        """
        A take that began while PostgreSQL was down returns tasks once it is back.
        """
        taker = await seam.taker()
        [task_id] = await submit(seam.db)
        postgres_server.cluster.kill()
        waiting = asyncio.create_task(take(taker))
        await asyncio.sleep(0.2)

        postgres_server.cluster.start()

        [claim] = await waiting
        assert task_id == claim.task_id


async def until_running(seam: Seam, count: int) -> None:
    """
    Wait until exactly `count` tasks are running.
    """
    running = await seam.db.fetchval("SELECT count(*) FROM asyncflow.tasks WHERE state = 'running'")
    assert count == running


async def take_ids_one_by_one(seam: Seam, taker: Transport, count: int) -> list[UUID]:
    """
    Take one task, complete it, take the next.
    """
    taken = []
    for _ in range(count):
        [claim] = await take(taker)
        taken.append(claim.task_id)
        await complete(seam.db, [claim])
        taker.let_go(claim)
    return taken


class TestPostgres(Conformance):
    """
    Without a broker.
    """

    @pytest.fixture
    async def seam(self, db: Database) -> AsyncIterator[Seam]:
        """
        Transports that poll PostgreSQL.
        """
        seam = PostgresSeam(db)
        async with seam.cleanup:
            yield seam


@pytest.mark.every_rabbitmq
class TestRabbitMQ(Conformance):
    """
    With RabbitMQ and a relay.
    """

    @pytest.fixture
    async def seam(self, db: Database, broker_url: str) -> AsyncIterator[Seam]:
        """
        Transports that receive hints.
        """
        seam = RabbitSeam(db, broker_url)
        relaying = asyncio.create_task(Relay(db, broker_url).run())
        async with seam.cleanup:
            yield seam
        relaying.cancel()
        await asyncio.gather(relaying, return_exceptions=True)
