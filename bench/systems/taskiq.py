"""
Taskiq on RabbitMQ through taskiq-aio-pika: quorum queue, persistent messages, confirms.

Variant `results`: results kept in PostgreSQL by taskiq-asyncpg.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvloop
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.queue import Queue, QueueType
from taskiq_asyncpg import AsyncpgResultBackend

from bench.addresses import broker_url, database_url, program, variant
from bench.probe import hit
from bench.systems import QUEUE, Submit, count_rows

KEEPS_RESULTS = variant() == "results"

_backend = AsyncpgResultBackend(database_url(), min_size=4, max_size=16) if KEEPS_RESULTS else None
broker = AioPikaBroker(
    broker_url(),
    qos=100,
    result_backend=_backend,
    task_queues=[Queue(name=QUEUE, type=QueueType.QUORUM)],
    dead_letter_queue=Queue(name="bench.dead"),
)


@broker.task(task_name="noop")
async def noop(number: int, submitted_at: float) -> None:
    hit(number, submitted_at)


def unfinished(count: int) -> int:
    if variant() != "results":
        return 0
    return count - count_rows("SELECT count(*) FROM taskiq_results")


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    command = [program("taskiq"), "worker", f"{__name__}:broker", "--workers", str(processes)]
    return [[*command, "--max-async-tasks", concurrency, "--log-level", "WARNING"]]


@asynccontextmanager
async def producer() -> AsyncIterator[Submit]:
    await broker.startup()

    async def submit(number: int, submitted_at: float) -> None:
        await noop.kiq(number, submitted_at)

    yield submit
    await broker.shutdown()


def fill(count: int) -> None:
    async def run() -> None:
        numbers = iter(range(count))
        async with producer() as submit:

            async def caller() -> None:
                for _ in numbers:
                    await submit(-1, 0.0)

            await asyncio.gather(*[caller() for _ in range(500)])

    uvloop.run(run())
