"""
The chores other than the reaper, and the loop that runs them all.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from asyncflow.errors import StoreUnavailable
from asyncflow.maintenance.chores import Chore, chores, run_chore
from asyncflow.maintenance.expirer import expire
from asyncflow.maintenance.pruner import prune
from asyncflow.maintenance.unqueuer import unqueue
from asyncflow.store import hints, read, workers
from asyncflow.store.database import Database, Executor
from asyncflow.store.wakeups import Listener, Waker
from tests.support.builders import as_sent
from tests.support.postgres import PostgresServer
from tests.support.tasks import (
    PATIENCE_SECONDS,
    a_worker,
    claim,
    complete,
    states,
    submit,
    until_states,
)


def test_the_list_says_what_runs_and_how_often() -> None:
    """
    The list gives recovery chores short periods and deletion long ones.
    """
    with_broker, without = (
        {chore.name: chore.period_seconds for chore in chores(retention_days=7, has_broker=has)}
        for has in (True, False)
    )

    assert {
        "reap": 1.0,
        "expire": 1.0,
        "move": 5.0,
        "report": 2.0,
        "watch unserved": 10.0,
        "prune": 60.0,
    } == with_broker
    assert with_broker | {"unqueue": 2.0} == without


async def test_tasks_queued_for_a_broker_that_is_gone_can_be_claimed(db: Database) -> None:
    """
    Tasks queued for an abandoned broker become claimable: without a relay nothing else frees them.
    """
    worker = await a_worker(db)
    ids = await submit(db, count=3)
    await hints.mark_queued(db, await as_sent(db, ids[:2]))
    await claim(db, worker.id, limit=3)
    assert {"queued": 2, "running": 1} == await states(db)

    assert 2 == await unqueue(db)

    assert {"pending": 2, "running": 1} == await states(db)
    await claim(db, worker.id, limit=3)
    assert {"running": 3} == await states(db)


async def test_a_waiting_task_past_its_time_is_cancelled(db: Database) -> None:
    """
    Pending and queued tasks past their deadline are cancelled; a running one is left to its worker.
    """
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    worker = await a_worker(db)
    await submit(db)
    await claim(db, worker.id)
    [running] = [row["id"] for row in await db.fetch("SELECT id FROM asyncflow.tasks")]
    [late] = await submit(db, expires_at=long_ago)
    await submit(db, expires_at=datetime.now(UTC) + timedelta(hours=1))
    await db.execute("UPDATE asyncflow.tasks SET expires_at = $2 WHERE id = $1", running, long_ago)

    assert 1 == await expire(db)

    task = await read.get(db, 1, late)
    assert ("CANCELLED", "Expired") == (task.status, (task.failure or {}).get("kind"))
    assert {"cancelled": 1, "running": 1, "pending": 1} == await states(db)


async def test_old_finished_tasks_are_deleted_and_no_others(db: Database) -> None:
    """
    Finished tasks are deleted once the retention since their end has passed, and no others.
    """
    worker = await a_worker(db)
    await submit(db, 2)
    await complete(db, await claim(db, worker.id, 2))
    await db.execute(
        "UPDATE asyncflow.tasks SET finished_at = now() - interval '8 days'"
        " WHERE id = (SELECT min(id::text)::uuid FROM asyncflow.tasks)"
    )
    await submit(db)
    await db.execute(
        "UPDATE asyncflow.tasks SET created_at = now() - interval '9 days' WHERE state = 'pending'"
    )

    assert 1 == await prune(db, retention_days=7)

    assert {"completed": 1, "pending": 1} == await states(db)


async def test_workers_long_gone_are_forgotten(db: Database) -> None:
    """
    Workers long gone are deleted even when no task is old enough to be deleted.
    """
    worker, living = await a_worker(db), await a_worker(db)
    await workers.stop(db, worker.id)
    await db.execute("UPDATE asyncflow.workers SET stopped_at = stopped_at - interval '2 days'")

    await prune(db, retention_days=7)

    left = await db.fetch("SELECT id FROM asyncflow.workers")
    assert [living.id] == [row["id"] for row in left]


class Turns:
    """
    A chore with prepared answers that counts its turns.
    """

    def __init__(self, *answers: int | BaseException) -> None:
        self.answers = list(answers)
        self.is_through = asyncio.Event()

    async def run_once(self, db: Executor) -> int:
        """
        Return the next answer; 0 when none are left.
        """
        if not self.answers:
            self.is_through.set()
            return 0
        answer = self.answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


async def run_to_the_end(turns: Turns, db: Database, *, wakes: bool = False) -> None:
    """
    Run the chore until its answers are used up.
    """
    waker = Waker(db)
    chore = Chore("test", turns.run_once, period_seconds=0.01, wakes=wakes)
    running = asyncio.create_task(run_chore(chore, db, waker))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await turns.is_through.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await waker.close()


async def test_a_chore_survives_every_failure(db: Database) -> None:
    """
    After an outage, a bug or a statement timeout, the chore gets its next turn.
    """
    turns = Turns(StoreUnavailable("down"), ValueError("a bug"), TimeoutError(), 1)

    await run_to_the_end(turns, db)

    assert [] == turns.answers


async def test_a_chore_that_hangs_is_stopped_for_this_turn(
    db: Database,
) -> None:
    """
    A turn that takes too long is cancelled, and the next one comes.
    """
    turns = Turns()
    hung = 0

    async def hang_once(db: Executor) -> int:
        nonlocal hung
        hung += 1
        if hung == 1:
            await asyncio.Event().wait()
        return await turns.run_once(db)

    chore = Chore("test", hang_once, period_seconds=0.01)
    running = asyncio.create_task(run_chore(chore, db, Waker(db), turn_seconds_max=0.05))
    async with asyncio.timeout(PATIENCE_SECONDS):
        await turns.is_through.wait()
    running.cancel()


async def test_while_there_is_work_a_chore_does_not_rest(db: Database) -> None:
    """
    A chore works off a backlog without pauses; its period applies only when idle.
    """
    turns = Turns(*[500] * 50)
    chore = Chore("test", turns.run_once, period_seconds=3_600)
    running = asyncio.create_task(run_chore(chore, db, Waker(db)))

    async with asyncio.timeout(PATIENCE_SECONDS):
        await turns.is_through.wait()
    running.cancel()


async def test_what_the_reaper_freed_wakes_the_workers(db: Database) -> None:
    """
    A chore that makes tasks due wakes the workers.
    """
    woken = asyncio.Event()
    async with Listener(db, woken.set):
        async with asyncio.timeout(PATIENCE_SECONDS):
            await woken.wait()  # The listener is ready now.
            woken.clear()
            await run_to_the_end(Turns(1), db, wakes=True)
            await woken.wait()


async def test_all_chores_go_on_through_an_outage(
    db: Database, postgres_server: PostgresServer
) -> None:
    """
    All chores continue after an outage of PostgreSQL.
    """
    waker = Waker(db)
    running = [
        asyncio.create_task(run_chore(chore, db, waker))
        for chore in chores(retention_days=7, has_broker=True)
    ]
    postgres_server.cluster.stop()
    postgres_server.cluster.start()

    await submit(db, expires_at=datetime.now(UTC) - timedelta(hours=1))

    await until_states(db, cancelled=1)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await waker.close()
