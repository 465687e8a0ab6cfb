"""
PgQueuer on PostgreSQL through an asyncpg pool on uvloop, `durability=durable`, its default.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from bench.addresses import database_url
from bench.probe import hit
from bench.systems import Submit, count_rows, timed_in_bulk

PAYLOAD = struct.Struct("<qd")


def _pool() -> asyncpg.pool.Pool:
    return asyncpg.create_pool(database_url(), min_size=4, max_size=16)


def prepare() -> None:
    async def run() -> None:
        async with _pool() as pool:
            await Queries(AsyncpgPoolDriver(pool)).install()

    asyncio.run(run())


def unfinished(count: int) -> int:
    return count_rows("SELECT count(*) FROM pgqueuer")


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    # Not `pgq run`: in 1.6.0 it fails with the Typer version our other requirements need.
    return [[sys.executable, "-m", __name__, concurrency] for _ in range(processes)]


async def work(batch_size: int) -> None:
    async with _pool() as pool:
        queuer = PgQueuer(AsyncpgPoolDriver(pool))

        @queuer.entrypoint("noop")
        async def noop(job: Job) -> None:
            assert job.payload is not None
            hit(*PAYLOAD.unpack(job.payload))

        await queuer.run(batch_size=batch_size)


@asynccontextmanager
async def producer() -> AsyncIterator[Submit]:
    async with _pool() as pool:
        queries = Queries(AsyncpgPoolDriver(pool))

        async def submit(number: int, submitted_at: float) -> None:
            await queries.enqueue("noop", PAYLOAD.pack(number, submitted_at))

        yield submit


def bulk(count: int) -> float:
    payload = PAYLOAD.pack(-1, 0.0)

    async def run() -> float:
        async with _pool() as pool:
            queries = Queries(AsyncpgPoolDriver(pool))
            return await timed_in_bulk(
                count,
                lambda size: queries.enqueue(["noop"] * size, [payload] * size, [0] * size),
            )

    return uvloop.run(run())


def fill(count: int) -> None:
    bulk(count)


if __name__ == "__main__":
    uvloop.run(work(int(sys.argv[1])))
