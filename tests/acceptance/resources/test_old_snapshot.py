"""
Another session holds a transaction open, so vacuum cannot remove rows deleted since it began and
tables only grow. `bench/held_snapshot.py` measures the cost over minutes.
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
    Hold a snapshot from the start of the block, in an idle transaction.
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
    A second batch completes although it has to scan all the dead rows of the first.
    """
    await system.start()
    idle = {"name": "sample-task", "payload": {"seconds": 0}}

    async with snapshot(system.database_url) as others:
        for _ in range(2):
            task_ids = await system.submit_batch([idle] * BATCH)
            assert {"completed": BATCH} == await system.all_terminal(task_ids)

        assert 0 == await others.fetchval(COUNT)
    assert [] == await system.punished()
