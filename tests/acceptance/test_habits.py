"""
Handlers as people write them: everything in `habits`, in one worker per isolation, on the oldest
and the newest Python. The worker survives, tasks running next to them are unaffected, and the
worker stops on request.
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import psutil
import pytest

from tests.acceptance.habits import HABITS, RESULT
from tests.support import pythons
from tests.support.process import Process
from tests.support.system import System

HABITS_FILE = Path(__file__).with_name("habits.py")
ISOLATIONS = ("loop", "thread", "process")
GRACE_SECONDS = 1.0
SLACK_SECONDS = 1.0
MEMORY_BYTES_MAX = 300 << 20
"""Half of the garbage that one of the habits leaves in each worker."""


@pytest.mark.timeout(400)  # It may install another Python's packages, once.
@pytest.mark.parametrize("version", pythons.VERSIONS)
async def test_a_worker_outlives_what_people_do_in_handlers(
    database_url: str, tmp_path: Path, version: str
) -> None:
    """
    In three workers, one per isolation, every habit returns its result at the first attempt, a task
    running next to them is undisturbed, and memory is reclaimed. Then, with everything the habits
    left behind and a handler that does not stop, SIGTERM ends each worker with status 0 within its
    grace period plus a second.
    """
    try:
        python = await asyncio.to_thread(pythons.python, version)
    except pythons.NoPython as error:
        pytest.skip(str(error))
    async with System(database_url=database_url, broker_url=None, folder=tmp_path) as system:
        await system.start_api()
        workers = dict(
            zip(
                ISOLATIONS,
                await asyncio.gather(*(start(system, where, python) for where in ISOLATIONS)),
                strict=True,
            )
        )
        beside = [await system.submit(f"neighbour.{where}") for where in ISOLATIONS]
        for task_id in beside:
            await system.reaches(task_id, "RUNNING")

        ended = await asyncio.gather(*(one_by_one(system, where) for where in ISOLATIONS))

        results = {name: result for each in ended for name, result in each.items()}
        assert dict.fromkeys(results, RESULT) == results
        neighbours = [await system.get(task_id) for task_id in beside]
        assert [("RUNNING", 1)] * 3 == [(task["status"], task["attempt"]) for task in neighbours]

        for where in ISOLATIONS:
            await system.finishes(await system.submit(f"rest.{where}"))
        memory = [psutil.Process(worker.pid).memory_info().rss for worker in workers.values()]
        for where in ISOLATIONS:
            await system.reaches(await system.submit(f"stubborn.{where}"), "RUNNING")
        stops = await asyncio.gather(*(stop(worker) for worker in workers.values()))

    assert all(held < MEMORY_BYTES_MAX for held in memory), memory
    assert [0, 0, 0] == [status for status, _ in stops]
    limit = GRACE_SECONDS + 1 + SLACK_SECONDS
    assert all(seconds < limit for _, seconds in stops), stops


async def start(system: System, where: str, python: Path) -> Process:
    """
    A worker whose handlers run in this isolation.
    """
    return await system.start_worker(
        handlers=[HABITS_FILE],
        python=python,
        test_isolation=where,
        worker_slots=8,
        shutdown_grace_seconds=GRACE_SECONDS,
    )


async def one_by_one(system: System, where: str) -> dict[str, object]:
    """
    Run every habit there, one after another; return their results.

    Not concurrently: a process forked by one thread inherits the pipes of another thread's
    `subprocess.run`, which then waits for it. Any threaded Python program does this.
    """
    ended = {}
    for name in (f"{habit}.{where}" for habit in HABITS):
        task = await system.finishes(await system.submit(name))
        ended[name] = task["result"] or task["error"]
    return ended


async def stop(worker: Process) -> tuple[int, float]:
    """
    Stop the worker; return its exit status and the seconds it took.

    The clock stands still while this machine gives us no CPU.
    """
    seconds = 0.0
    worker.send(signal.SIGTERM)
    ending = asyncio.create_task(worker.exit_status(timeout_seconds=60))
    while not ending.done():
        await asyncio.sleep(0.01)
        seconds += 0.01
    return await ending, seconds
