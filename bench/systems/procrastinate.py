"""
Procrastinate on PostgreSQL through psycopg 3, its recommended connector, with LISTEN/NOTIFY.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import procrastinate

from bench.addresses import database_url, program
from bench.probe import hit
from bench.systems import Submit, count_rows, timed_in_bulk

app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(conninfo=database_url(), min_size=4, max_size=16)
)


@app.task(name="noop")
async def noop(number: int, submitted_at: float) -> None:
    hit(number, submitted_at)


def prepare() -> None:
    async def run() -> None:
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    asyncio.run(run())


def unfinished(count: int) -> int:
    return count_rows("SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')")


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    command = [program("procrastinate"), "--app", f"{__name__}.app", "worker"]
    return [[*command, "--concurrency", concurrency] for _ in range(processes)]


@asynccontextmanager
async def producer() -> AsyncIterator[Submit]:
    async with app.open_async():

        async def submit(number: int, submitted_at: float) -> None:
            await noop.defer_async(number=number, submitted_at=submitted_at)

        yield submit


def bulk(count: int) -> float:
    async def run() -> float:
        async with app.open_async():
            return await timed_in_bulk(
                count,
                lambda size: noop.batch_defer_async(*[{"number": -1, "submitted_at": 0.0}] * size),
            )

    return asyncio.run(run())


def fill(count: int) -> None:
    bulk(count)
