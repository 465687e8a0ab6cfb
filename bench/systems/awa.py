"""
Awa, a Rust core with Python bindings, on PostgreSQL: its queue-storage engine, on uvloop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import awa
import uvloop

from bench.addresses import database_url
from bench.probe import hit
from bench.systems import QUEUE, Submit, timed_in_bulk


@dataclass
class Noop:
    number: int
    submitted_at: float


def _client() -> awa.AsyncClient:
    # Its driver requires a host even with the folder of a Unix socket.
    url = database_url().replace("@/", "@localhost/")
    return awa.AsyncClient(url, max_connections=16)


def prepare() -> None:
    async def run() -> None:
        async with _client() as client:
            await client.migrate()
            # Otherwise a new database would use the older, slower engine.
            await client.install_queue_storage()

    asyncio.run(run())


def unfinished(count: int) -> int:
    async def run() -> int:
        async with _client() as client:
            stats = [queue for queue in await client.queue_stats() if queue.queue == QUEUE]
            return sum(queue.available + queue.running for queue in stats)

    return asyncio.run(run())


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    return [[sys.executable, "-m", __name__, concurrency] for _ in range(processes)]


async def work(concurrency: int) -> None:
    client = _client()

    @client.task(Noop, queue=QUEUE)
    async def noop(job: awa.Job) -> None:
        hit(job.args.number, job.args.submitted_at)

    await client.start([(QUEUE, concurrency)])
    await asyncio.Event().wait()


@asynccontextmanager
async def producer() -> AsyncIterator[Submit]:
    async with _client() as client:

        async def submit(number: int, submitted_at: float) -> None:
            await client.insert(Noop(number, submitted_at), queue=QUEUE)

        yield submit


def bulk(count: int) -> float:
    async def run() -> float:
        async with _client() as client:
            return await timed_in_bulk(
                count,
                lambda size: client.enqueue_many_copy([Noop(-1, 0.0)] * size, queue=QUEUE),
            )

    return asyncio.run(run())


def fill(count: int) -> None:
    bulk(count)


if __name__ == "__main__":
    uvloop.run(work(int(sys.argv[1])))
