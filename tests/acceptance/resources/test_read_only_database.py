"""
PostgreSQL becomes read-only, as after a failover to a standby: reads keep working, writes wait, and
no attempt is charged for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from tests.support.system import System

FLOWING_AGAIN_SECONDS = 30.0
WORKING = {"seconds": 0.1}
REASON = "read-only transaction"


@asynccontextmanager
async def read_only(url: str) -> AsyncIterator[None]:
    """
    Make the server of `url` read-only for a block, for open connections too.
    """
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await connection.execute("SELECT pg_reload_conf()")
        yield
    finally:
        await connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()


async def test_a_read_only_database_costs_time_and_no_task(system: System) -> None:
    """
    Requests that write get 503 with a reason, requests that read get 200, and results returned
    meanwhile are kept.
    """
    started = await system.start()
    _, [worker], _ = started

    async with system.load(payload=WORKING) as load:
        await load.has_accepted(20)
        running = await system.submit("work", {"seconds": 1.0})
        await system.journal.wait_for("start", running)
        async with read_only(system.database_url):
            await load.is_refused()
            refused = await system.client.post(f"{system.url}/tasks", json={"name": "work"})
            ready = await system.client.get(f"{system.url}/health/ready")
            await system.journal.wait_for("end", running)
            await worker.log_event("settle.delayed", task_id=running)
            await worker.complains(REASON)
            read = await system.get(running)
        await load.has_accepted(5)
        await system.finishes(load.accepted[-1], timeout_seconds=FLOWING_AGAIN_SECONDS)

    assert (503, 503) == (refused.status_code, ready.status_code)
    assert "The database is unavailable; try again." == refused.json()["detail"]
    assert refused.headers["Retry-After"]
    assert "RUNNING" == read["status"]
    assert {503} == set(load.refused)
    assert None not in load.retry_after
    assert 0 == load.broken
    task_ids = [running, *load.accepted]
    assert {"completed": len(task_ids)} == await system.all_terminal(task_ids)
    assert {"attempt": 1} == (await system.finishes(running))["result"]
    assert [] == await system.punished()
    assert all(process.is_running for processes in started for process in processes)


async def test_a_database_that_is_read_only_past_the_leases_punishes_nobody(
    alone: System,
) -> None:
    """
    The worker fences itself and returns under the same id; it is not declared dead, and the tasks
    it ran start again without a failure.
    """
    started = await alone.start(heartbeat_seconds=0.25, lease_seconds=1.5)
    _, [worker], [maintenance] = started
    # Before that, no worker would be declared dead anyway.
    await alone.locks_prove_death()
    task_ids = [await alone.submit("work", {"seconds": 2}) for _ in range(4)]
    for task_id in task_ids:
        await alone.journal.wait_for("start", task_id)

    async with read_only(alone.database_url):
        await worker.log_event("worker.fenced")
        await maintenance.complains(REASON)
        await alone.until(lambda: leases_are_over(alone), "the leases are over")

    assert {"completed": 4} == await alone.all_terminal(task_ids)
    assert [] == await alone.punished()
    assert all([(await alone.get(task_id))["attempt"] > 1 for task_id in task_ids])
    assert 1 == sum(line["event"] == "process.started" for line in worker.lines)
    assert not maintenance.has_logged("worker.lost")
    assert all(process.is_running for processes in started for process in processes)


async def leases_are_over(system: System) -> bool:
    """
    Whether all heartbeats are too old for anything but an outage.
    """
    query = """
        SELECT 1 FROM asyncflow.workers
         WHERE heartbeat_at < now() - lease_seconds * interval '1 second'
    """
    return bool(await system.rows(query))
