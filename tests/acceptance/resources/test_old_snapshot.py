"""
A transaction that others hold open: nothing that was deleted since can be removed, and tables only
grow. What that costs over minutes is measured by `bench/held_snapshot.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from tests.support.system import System

BATCH = 1_000
COUNT = "SELECT count(*) FROM asyncflow.tasks"


@asynccontextmanager
async def snapshot(url: str) -> AsyncIterator[asyncpg.Connection]:
    """
    A transaction that sees the database as it is at the start of the block, idle meanwhile.
    """
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval(COUNT)
            yield connection
    finally:
        await connection.close()


async def test_batches_complete_beside_a_transaction_that_stays_open(system: System) -> None:
    """
    The second one meets all the dead rows of the first.
    """
    await system.start()
    idle = {"name": "sample-task", "payload": {"seconds": 0}}

    async with snapshot(system.database_url) as others:
        for _ in range(2):
            task_ids = await system.submit_batch([idle] * BATCH)
            assert {"completed": BATCH} == await system.all_terminal(task_ids)

        assert 0 == await others.fetchval(COUNT)
    assert [] == await system.punished()
