"""
Submits tasks, in a separate process so that the load has a Python interpreter to itself.

    python -m bench.produce SYSTEM prepare
                                   fill COUNT
                                   rate COUNT CONCURRENCY
                                   bulk COUNT
                                   trickle COUNT PERIOD_SECONDS [FIRST_NUMBER]
                                   flow PER_SECOND SECONDS CONCURRENCY

Prints one number: tasks per second, or 0 where no rate applies. Systems with an async client submit
from coroutines of one loop, as concurrent request handlers would; the others from threads. `flow`
with 0 per second submits as fast as it can.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import uvloop

from bench.systems import Submit, System, load_system

UNNUMBERED = (-1, 0.0)


def rate(system: System, count: int, concurrency: int) -> float:
    """
    Submit `count` tasks one by one and return the number acknowledged per second.
    """
    if system.producer is None:
        return _rate_in_threads(system, count, concurrency)
    return _run(system, lambda submit: _rate(submit, count, concurrency))


async def _rate(submit: Submit, count: int, concurrency: int) -> float:
    numbers = iter(range(count))

    async def caller() -> None:
        for _ in numbers:
            await submit(*UNNUMBERED)

    start = time.perf_counter()
    await asyncio.gather(*[caller() for _ in range(concurrency)])
    return count / (time.perf_counter() - start)


def _rate_in_threads(system: System, count: int, concurrency: int) -> float:
    share = count // concurrency

    def caller(calls: int) -> None:
        for _ in range(calls):
            system.send(*UNNUMBERED)

    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(caller, [1] * concurrency))  # Every caller connects.
        start = time.perf_counter()
        list(pool.map(caller, [share] * concurrency))
        return share * concurrency / (time.perf_counter() - start)


def trickle(system: System, count: int, period_seconds: float, first: int) -> float:
    """
    Submit numbered tasks at even intervals, one at a time.
    """
    if system.producer is None:
        start = time.perf_counter()
        for step in range(count):
            time.sleep(max(0.0, start + step * period_seconds - time.perf_counter()))
            system.send(first + step, time.perf_counter())
        return 0.0

    async def run(submit: Submit) -> float:
        start = time.perf_counter()
        for step in range(count):
            await asyncio.sleep(max(0.0, start + step * period_seconds - time.perf_counter()))
            await submit(first + step, time.perf_counter())
        return 0.0

    return _run(system, run)


def flow(system: System, per_second: float, seconds: float, concurrency: int) -> float:
    """
    Submit at a steady rate for some time and return the rate achieved.
    """
    if system.producer is None:
        return _flow_in_threads(system, per_second, seconds, concurrency)
    return _run(system, lambda submit: _flow(submit, per_second, seconds, concurrency))


async def _flow(submit: Submit, per_second: float, seconds: float, concurrency: int) -> float:
    steps = itertools.count()
    start = time.perf_counter()

    async def caller() -> int:
        done = 0
        for step in steps:
            due = start + step / per_second if per_second else 0.0
            if max(due, time.perf_counter()) > start + seconds:
                break
            if due > time.perf_counter():
                await asyncio.sleep(due - time.perf_counter())
            await submit(*UNNUMBERED)
            done += 1
        return done

    done = sum(await asyncio.gather(*[caller() for _ in range(concurrency)]))
    return done / (time.perf_counter() - start)


def _flow_in_threads(system: System, per_second: float, seconds: float, concurrency: int) -> float:
    def caller(_: int) -> int:
        for step in itertools.count():
            due = start + step * concurrency / per_second if per_second else 0.0
            if max(due, time.perf_counter()) > start + seconds:
                return step
            time.sleep(max(0.0, due - time.perf_counter()))
            system.send(*UNNUMBERED)
        return 0

    with ThreadPoolExecutor(concurrency) as pool:
        start = time.perf_counter()
        done = sum(pool.map(caller, range(concurrency)))
        return done / (time.perf_counter() - start)


def _run(system: System, load: Callable[[Submit], Awaitable[float]]) -> float:
    async def run() -> float:
        assert system.producer is not None
        async with system.producer() as submit:
            return await load(submit)

    return uvloop.run(run())


def _main() -> None:
    system = load_system(sys.argv[1])
    match sys.argv[2:]:
        case ["prepare"]:
            system.prepare()
            print(0.0)
        case ["fill", count]:
            system.fill(int(count))
            print(0.0)
        case ["rate", count, concurrency]:
            print(rate(system, int(count), int(concurrency)))
        case ["bulk", count]:
            assert system.bulk is not None
            print(system.bulk(int(count)))
        case ["trickle", count, period, first]:
            print(trickle(system, int(count), float(period), int(first)))
        case ["flow", per_second, seconds, concurrency]:
            print(flow(system, float(per_second), float(seconds), int(concurrency)))
        case other:
            raise SystemExit(f"bench.produce does not know {other}")


if __name__ == "__main__":
    _main()
