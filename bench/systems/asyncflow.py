"""
AsyncFlow. Variant `rabbitmq`: hints travel through RabbitMQ, and the system includes the
maintenance process that relays them; otherwise PostgreSQL carries everything.

Submitting from Python goes through `store.submit` in natural batches, as the API's own
endpoint does.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from asyncflow.aio.batching import Batcher
from asyncflow.domain.task import DEFAULT_TENANT_ID, NewTask, TaskIds
from asyncflow.store.database import Database
from asyncflow.store.migrations import migrate
from asyncflow.store.submit import Submitted, submit
from asyncflow.store.wakeups import Waker, send_wakeup
from bench.addresses import broker_url, database_url, program, variant
from bench.systems import Submit, count_rows, timed_in_bulk

HANDLERS = str(Path(__file__).parents[1] / "handlers.py")

TASK, TEXT_BYTES, WAIT_SECONDS = "BENCH_TASK", "BENCH_TEXT_BYTES", "BENCH_WAIT_SECONDS"
"""What `fill` submits: the handler's name, the length of the payload's text, the wait."""

_ids = TaskIds()


def environment() -> dict[str, str]:
    """
    The settings of AsyncFlow's processes; all others have their defaults.
    """
    settings = {"ASYNCFLOW_DATABASE_URL": database_url(), "ASYNCFLOW_LOG_FORMAT": "json"}
    if variant() == "rabbitmq":
        settings["ASYNCFLOW_BROKER_URL"] = broker_url()
    return settings


def prepare() -> None:
    asyncio.run(migrate(database_url()))


def unfinished(count: int) -> int:
    return count_rows("SELECT count(*) FROM asyncflow.tasks_live")


def worker_commands(processes: int, concurrency: str) -> list[list[str]]:
    settings = [f"{name}={value}" for name, value in environment().items()]
    command = ["env", *settings, program("asyncflow")]
    worker = [*command, "worker", "--handlers", HANDLERS]
    if concurrency:
        worker += ["--slots", concurrency]
    if processes > 1:
        worker += ["--processes", str(processes)]
    return [worker, [*command, "maintenance"]] if variant() == "rabbitmq" else [worker]


@asynccontextmanager
async def producer() -> AsyncIterator[Submit]:
    async with Database(database_url()) as db:
        waker = Waker(db)
        batcher: Batcher[NewTask, Submitted] = Batcher(partial(submit, db))

        async def submit_one(number: int, submitted_at: float) -> None:
            payload = json.dumps({"number": number, "submitted_at": submitted_at})
            await batcher.submit(new_task(payload))
            waker.wake()

        await submit_one(-1, 0.0)
        yield submit_one
        await waker.close()


def bulk(count: int) -> float:
    return asyncio.run(_bulk(count, json.dumps({"number": -1, "submitted_at": 0.0})))


def fill(count: int) -> None:
    name = os.environ.get(TASK, "bench-noop")
    text = "x" * int(os.environ.get(TEXT_BYTES, "0"))
    asyncio.run(_bulk(count, json.dumps({"text": text} if text else {}), name))


async def _bulk(count: int, payload: str, name: str = "bench-noop") -> float:
    async with Database(database_url()) as db:
        numbers = iter(range(count))

        async def submit_many(size: int) -> None:
            await submit(db, [new_task(payload, name, next(numbers)) for _ in range(size)])
            await send_wakeup(db)

        return await timed_in_bulk(count, submit_many)


def new_task(payload: str, name: str = "bench-noop", number: int = 0) -> NewTask:
    """
    A task for one of `bench.handlers`; one of ten `bench-flaky` tasks fails its first attempt.
    """
    if name == "bench-flaky":
        payload = json.dumps({"fails_first": number % 10 == 0})
    elif name == "bench-wait":
        # By default 0.5 to 5 seconds, in a repeating order that gives no worker an advantage.
        wait_seconds = float(os.environ.get(WAIT_SECONDS, 0.5 + number * 7 % 19 / 4))
        payload = json.dumps({"seconds": wait_seconds})
    return NewTask(
        id=_ids.next(),
        tenant_id=DEFAULT_TENANT_ID,
        name=name,
        queue="default",
        priority=4,
        payload=payload,
    )
