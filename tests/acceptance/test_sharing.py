"""
Several workers share tasks evenly. `bin/bench` measures the speedup.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from tests.support.system import System

TASKS = 30
TASK_SECONDS = 0.3
SLOTS_OPTION = ("--slots", "2")


async def test_more_workers_share_evenly(system: System) -> None:
    """
    With 3 and then 5 workers of two slots, each runs its share of the tasks.
    """
    await system.start(workers=0)
    for workers in (3, 5):
        newcomers = range(await alive(system), workers)
        await asyncio.gather(*(system.start_worker(*SLOTS_OPTION) for _ in newcomers))
        task_ids = await system.submit_batch(
            [{"name": "work", "payload": {"seconds": TASK_SECONDS}}] * TASKS
        )
        assert {"completed": TASKS} == await system.all_terminal(task_ids)

        shares = await shares_of(system, task_ids)
        assert len(shares) == workers
        assert min(shares.values()) >= 0.6 * TASKS / workers
        assert max(shares.values()) <= 1.4 * TASKS / workers


async def test_a_busy_worker_leaves_tasks_to_an_idle_one(system: System) -> None:
    """
    No worker holds tasks back that it cannot start while another has a free slot.
    """
    await system.start(workers=2, worker_slots=1)
    long = await system.submit("work", {"seconds": 3})
    await system.journal.wait_for("start", long)

    task_ids = await system.submit_batch([{"name": "work", "payload": {"seconds": 0.1}}] * 10)

    assert {"completed": 10} == await system.all_terminal(task_ids)
    assert "RUNNING" == (await system.get(long))["status"]


async def alive(system: System) -> int:
    """
    Number of live workers.
    """
    query = "SELECT count(*) FROM asyncflow.workers WHERE stopped_at IS NULL AND lost_at IS NULL"
    return int((await system.rows(query))[0][0])


async def shares_of(system: System, task_ids: list[str]) -> Counter[str]:
    """
    Number of these tasks that each worker completed.
    """
    query = """
        SELECT worker_id::text, count(*)
          FROM asyncflow.tasks WHERE id = ANY ($1) GROUP BY worker_id
    """
    rows = await system.rows(query, task_ids)
    return Counter({row["worker_id"]: row["count"] for row in rows})
