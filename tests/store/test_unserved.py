"""
Tasks that no live worker offers are found, whatever else waits.
"""

from __future__ import annotations

from asyncflow.store import queues, workers
from asyncflow.store.database import Database
from asyncflow.store.submit import submit
from asyncflow.store.unserved import Unserved, unserved
from tests.support.builders import NAME, QUEUE, a_worker, new_task


async def found(
    db: Database, *, sample: int = 1_000, due_for: float = 0.0
) -> list[tuple[str, str, int]]:
    """
    The unserved tasks, as queue, name and count.
    """
    waiting = await unserved(db, sample=sample, due_for_seconds=due_for)
    assert all(isinstance(one, Unserved) and one.waiting_seconds >= 0 for one in waiting)
    return [(one.queue, one.name, one.count) for one in waiting]


async def test_tasks_are_unserved_until_a_live_worker_offers_them(db: Database) -> None:
    """
    Tasks count as unserved by queue and name; those in paused queues are meant to wait.
    """
    await submit(db, [new_task(queue="nobody") for _ in range(600)])
    await submit(db, [new_task(name="unknown"), new_task(), new_task(queue="paused")])
    await submit(db, [new_task(queue="later", delay_seconds=60)])
    await queues.pause(db, "paused")

    without_workers = await found(db)
    worker = await a_worker(db)
    with_one = await found(db)
    await a_worker(db, queues=("nobody",))
    await a_worker(db, handlers=("unknown",))
    with_all = await found(db)
    await workers.stop(db, worker.id)
    after_one_stopped = await found(db)

    assert [("nobody", NAME, 600), (QUEUE, NAME, 1), (QUEUE, "unknown", 1)] == without_workers
    assert [("nobody", NAME, 600), (QUEUE, "unknown", 1)] == with_one
    assert [] == with_all
    assert [(QUEUE, NAME, 1)] == after_one_stopped


async def test_a_scan_is_bounded_and_sees_the_oldest(db: Database) -> None:
    """
    A scan is bounded and reads the oldest tasks: served ones move on, so unserved ones stay in
    front.
    """
    await a_worker(db)
    await submit(db, [new_task(name="unknown") for _ in range(30)])
    await submit(db, [new_task() for _ in range(300)])

    assert [(QUEUE, "unknown", 20)] == await found(db, sample=20)


async def test_what_became_due_just_now_is_given_time(db: Database) -> None:
    """
    A task that just became due is not reported yet, since workers are replaced all the time.
    """
    await submit(db, [new_task()])

    assert [] == await found(db, due_for=30)
    await db.execute("UPDATE asyncflow.tasks SET run_at = now() - interval '31 seconds'")
    assert [(QUEUE, NAME, 1)] == await found(db, due_for=30)
