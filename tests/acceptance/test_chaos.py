"""
Thousands of tasks while a random process is killed every few seconds and started again.

`ASYNCFLOW_TEST_TASKS` says how many tasks each engine gets, `ASYNCFLOW_TEST_SEED` which
processes die. `--log-cli-level=info` shows what became of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx
import pytest

from acceptance.process import Process
from acceptance.system import System

TASKS = int(os.environ.get("ASYNCFLOW_TEST_TASKS", "5000"))
SEED = int(os.environ.get("ASYNCFLOW_TEST_SEED", "1"))

KILL_PERIOD_SECONDS = 5.0
TASKS_PER_SECOND = 250
BATCH = 50
NOTED_SHARE = 5
"""One task in so many takes a moment and writes its executions into the journal."""

log = logging.getLogger(__name__)

Start = Callable[[], Awaitable[Process]]


@pytest.mark.timeout(600)
async def test_every_task_completes_exactly_once_while_processes_are_killed(
    system: System,
) -> None:
    """
    2 APIs, 3 workers and 2 maintenance processes, one of them killed every five seconds:
    every accepted task is COMPLETED, once by its row, and each execution is accounted for.
    """
    fleet = await start_fleet(system)
    kills: list[str] = []
    enough = asyncio.Event()
    killing = asyncio.create_task(kill_and_restart(fleet, kills, enough))
    began = time.monotonic()
    try:
        accepted = await submit_all(system)
    finally:
        enough.set()
        await killing
    everything = await all_ids(system)

    assert {"completed": len(everything)} == await system.all_terminal(
        everything, timeout_seconds=60
    )
    seconds = time.monotonic() - began

    assert len(accepted) == TASKS
    assert set(accepted) <= set(everything)
    assert len(kills) >= 3
    executions = await check_executions(system)
    assert executions > len(everything), "no task was hit"
    log.info(
        "%d tasks, %d attempts, %.1f s, killed: %s",
        *(len(everything), executions, seconds, ", ".join(kills)),
    )


async def start_fleet(system: System) -> list[tuple[Process, Start]]:
    """
    Every process, and how to start it again.
    """
    await system.locks_prove_death()
    apis, workers, maintenances = await system.start(apis=2, workers=3, maintenances=2)
    ports = [int(api.lines[0]["url"].rpartition(":")[2]) for api in apis]
    return [
        *(
            (api, lambda port=port: system.start_api(port=port))
            for api, port in zip(apis, ports, strict=True)
        ),
        *((worker, system.start_worker) for worker in workers),
        *((maintenance, system.start_maintenance) for maintenance in maintenances),
    ]


async def kill_and_restart(
    fleet: list[tuple[Process, Start]], died: list[str], enough: asyncio.Event
) -> None:
    """
    Kill one process of the fleet after the other, chosen by the seed, until `enough`.
    """
    chance = random.Random(SEED)
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(KILL_PERIOD_SECONDS):
                await enough.wait()
                return
        number = chance.randrange(len(fleet))
        victim, start = fleet[number]
        await victim.kill()
        died.append(victim.name)
        fleet[number] = (await start(), start)


async def submit_all(system: System) -> list[str]:
    """
    Submit the tasks in batches at a steady rate; a batch without a 202 goes again.
    """
    accepted: list[str] = []
    began = time.monotonic()
    while len(accepted) < TASKS:
        tasks = [a_task(len(accepted) + i) for i in range(min(BATCH, TASKS - len(accepted)))]
        try:
            response = await system.client.post(f"{system.url}/tasks/batch", json={"tasks": tasks})
        except httpx.TransportError:
            continue
        if response.status_code == 202:
            accepted += [task["id"] for task in response.json()["tasks"]]
            ahead = len(accepted) / TASKS_PER_SECOND - (time.monotonic() - began)
            await asyncio.sleep(max(0.0, ahead))
        else:
            assert response.status_code == 503, response.text
    return accepted


def a_task(number: int) -> dict[str, object]:
    """
    A task that takes no time, or one that takes long enough to be hit.
    """
    if number % NOTED_SHARE:
        return {"name": "sample-task", "payload": {"seconds": 0}}
    return {"name": "work", "payload": {"seconds": 0.3}}


async def all_ids(system: System) -> list[str]:
    """
    Every task there is. A batch whose API died before it answered may be stored all the same.
    """
    return [row["id"] for row in await system.rows("SELECT id::text FROM asyncflow.tasks")]


async def check_executions(system: System) -> int:
    """
    Hold the rows, the history and the journal against each other; return how many attempts
    were made.
    """
    # Every attempt but the one that completed is in the history, with an honest outcome.
    [strange] = await system.rows(
        """
        SELECT count(*)
          FROM asyncflow.tasks t
         WHERE t.attempt <> 1 + (SELECT count(*) FROM asyncflow.attempts a
                                  WHERE a.task_id = t.id
                                    AND a.outcome IN ('retried', 'released'))
        """
    )
    assert strange["count"] == 0
    rows = await system.rows("SELECT id::text, name, attempt FROM asyncflow.tasks")
    attempts = {row["id"]: row["attempt"] for row in rows}
    starts = Counter(entry.task_id for entry in system.journal.entries(what="start"))
    ends = Counter(entry.task_id for entry in system.journal.entries(what="end"))
    for row in rows:
        if row["name"] == "work":
            assert 1 <= ends[row["id"]] <= starts[row["id"]] <= attempts[row["id"]]
    return sum(attempts.values())
