"""
The measured systems, one module each, used through their public APIs only.

A module has these names; those with a default may be left out:

    prepare()               create tables; queues are declared when first used
    fill(count)             make a backlog, no matter how
    unfinished(count)       of `count` tasks, how many are not finished in durable state; 0
                            where a system keeps none
    worker_commands(processes, concurrency)
    producer()              async context manager of `submit(number, submitted_at)`, or
    send(number, submitted_at)    for systems with a blocking client
    bulk(count)             submit through the system's bulk API and return the rate; None
                            where it has none

Their handler is `hit(number, submitted_at)` and nothing else.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

Submit = Callable[[int, float], Awaitable[None]]

BULK = 1_000
"""Tasks per call of a bulk API."""

QUEUE = "bench"
"""The queue of every system that can choose its name."""


@dataclass(frozen=True, slots=True)
class System:
    """
    One system's module; see this package's docstring.
    """

    prepare: Callable[[], None]
    fill: Callable[[int], None]
    worker_commands: Callable[[int, str], list[list[str]]]
    unfinished: Callable[[int], int]
    producer: Callable[[], AbstractAsyncContextManager[Submit]] | None
    send: Callable[[int, float], None]
    bulk: Callable[[int], float] | None


def load_system(name: str) -> System:
    """
    Import the module with this name.
    """
    module = importlib.import_module(f"bench.systems.{name}")

    def no_send(number: int, submitted_at: float) -> None:
        raise TypeError(f"{name} submits from coroutines")

    return System(
        prepare=getattr(module, "prepare", lambda: None),
        fill=module.fill,
        worker_commands=module.worker_commands,
        unfinished=getattr(module, "unfinished", lambda count: 0),
        producer=getattr(module, "producer", None),
        send=getattr(module, "send", no_send),
        bulk=getattr(module, "bulk", None),
    )


async def timed_in_bulk(count: int, submit_many: Callable[[int], Awaitable[Any]]) -> float:
    """
    Call `submit_many` with up to `BULK` tasks until `count` are submitted; return the rate.
    """
    start = time.perf_counter()
    for first in range(0, count, BULK):
        await submit_many(min(BULK, count - first))
    return count / (time.perf_counter() - start)


def count_rows(statement: str) -> int:
    """
    Run a counting query on the measurement's database.
    """
    import psycopg

    from bench.addresses import database_url

    with psycopg.connect(database_url()) as connection:
        row = connection.execute(statement.encode()).fetchone()
    return int(row[0]) if row else 0
