"""
The log reports that maintenance is missing, and that tasks wait without a worker that offers them.
"""

from __future__ import annotations

import asyncio
import time

from structlog.testing import capture_logs

from asyncflow.maintenance.chores import chores, run_chore
from asyncflow.maintenance.unserved import NAMED_MAX, UnservedWatch
from asyncflow.maintenance.watch import REPEAT_SECONDS, MaintenanceWatch
from asyncflow.store.database import Database
from asyncflow.store.presence import SILENT_SECONDS_MAX, presence
from asyncflow.store.wakeups import Waker
from tests.support.tasks import a_worker, submit, until


async def test_maintenance_is_seen_with_what_its_relay_says(db: Database) -> None:
    """
    A maintenance process reports itself and its relay's trouble from its first seconds on.
    """
    assert (await presence(db)).is_gone
    listed = chores(retention_days=7, has_broker=True, relay_trouble=lambda: "no permission")
    [chore] = [chore for chore in listed if chore.name == "report"]
    running = asyncio.create_task(run_chore(chore, db, Waker(db)))

    async def is_seen() -> bool:
        return not (await presence(db)).is_gone

    await until(is_seen)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    assert "no permission" == (await presence(db)).relay_trouble


async def test_the_absence_of_maintenance_is_logged_now_and_then(db: Database) -> None:
    """
    The absence of maintenance is not logged at startup, when it may be about to start too; later it
    is logged every ten minutes until it is back.
    """
    watch = MaintenanceWatch(db)
    start = time.monotonic()

    async def told(after_seconds: float) -> list[str]:
        with capture_logs() as logs:
            await watch.check(now=start + after_seconds)
        return [event["event"] for event in logs]

    late = SILENT_SECONDS_MAX + 1
    assert [] == await told(SILENT_SECONDS_MAX - 1)
    assert ["maintenance.gone"] == await told(late)
    assert [] == await told(late + REPEAT_SECONDS - 1)
    assert ["maintenance.gone"] == await told(late + REPEAT_SECONDS + 1)
    await db.execute("INSERT INTO asyncflow.maintenance (seen_at) VALUES (now())")
    assert ["maintenance.back"] == await told(late + REPEAT_SECONDS + 2)
    assert [] == await told(late + REPEAT_SECONDS + 3)


async def test_tasks_without_a_worker_are_named_once(db: Database) -> None:
    """
    The log names the queue and number of unserved tasks once, and says when they are served again.
    """
    watch = UnservedWatch(due_for_seconds=0)

    async def told() -> list[tuple[object, ...]]:
        with capture_logs() as logs:
            assert 0 == await watch.check(db)
        return [
            (event["event"], event["queue"], event["name"], event.get("count")) for event in logs
        ]

    await submit(db, 600, queue="nobody", name="work")
    first, second = await told(), await told()
    await submit(db, 1_000, queue="nobody", name="work")
    worker = await a_worker(db, queues=("nobody",))
    served = await told()
    await db.execute("UPDATE asyncflow.workers SET stopped_at = now() WHERE id = $1", worker.id)
    again = await told()

    assert [("tasks.unserved", "nobody", "work", 600)] == first
    assert [] == second
    assert [("tasks.served", "nobody", "work", None)] == served
    assert [("tasks.unserved", "nobody", "work", "1000 or more")] == again


async def test_many_names_without_a_worker_do_not_fill_the_log(db: Database) -> None:
    """
    Of many names without a worker, only the largest are logged, enough to see what is wrong.
    """
    watch = UnservedWatch(due_for_seconds=0)
    for number in range(NAMED_MAX + 5):
        await submit(db, name=f"made-up-{number}")

    with capture_logs() as logs:
        await watch.check(db)
        await watch.check(db)

    assert NAMED_MAX == len(logs)
