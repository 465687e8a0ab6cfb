"""
Workers and child processes die, freeze or come back: every task runs again, and only one result
counts.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from functools import partial

import psutil
import pytest

from tests.support.process import Process, is_gone
from tests.support.system import HANDLERS, System

WORKER_RERUN_SECONDS = 5.0
CHILD_RERUN_SECONDS = 2.0


async def test_a_task_of_a_killed_worker_runs_again_within_five_seconds(system: System) -> None:
    """
    After kill -9 of a worker another one starts its task again, and the history shows both
    attempts.
    """
    _, workers, _ = await system.start(workers=2)
    await system.locks_prove_death()
    task_id = await system.submit("work", {"seconds": 1})
    first = await system.journal.wait_for("start", task_id)

    await owner(workers, first.pid).kill()
    killed_at = time.monotonic()
    second = await system.journal.wait_for("start", task_id, attempt=2)
    task = await system.finishes(task_id)

    assert second.time - killed_at <= WORKER_RERUN_SECONDS
    assert "COMPLETED" == task["status"]
    assert {"attempt": 2} == task["result"]
    assert ["RETRIED", "COMPLETED"] == [a["outcome"] for a in task["attempts"]]
    assert "WorkerLost" == task["attempts"][0]["error"]["kind"]
    assert task["attempts"][0]["worker_id"] != task["attempts"][1]["worker_id"]
    assert 1 == task["failures"]


@pytest.mark.any_engine
async def test_child_processes_die_with_their_worker(system: System) -> None:
    """
    kill -9 of a worker also ends its child processes, even busy ones.
    """
    _, [worker], _ = await system.start()
    task_ids = [
        await system.submit(name, {"seconds": 60}) for name in ("work-in-process", "crunch")
    ]
    starts = [await system.journal.wait_for("start", task_id) for task_id in task_ids]

    await worker.kill()

    for pid in (start.pid for start in starts):
        await system.until(partial(is_gone, pid), "the child is gone", timeout_seconds=2)


@pytest.mark.any_engine
async def test_a_task_of_a_killed_child_runs_again_within_two_seconds(system: System) -> None:
    """
    After kill -9 of the child process that runs a handler, its worker runs the task again.
    """
    await system.start()
    task_id = await system.submit("work-in-process", {"seconds": 1})
    first = await system.journal.wait_for("start", task_id)

    os.kill(first.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    second = await system.journal.wait_for("start", task_id, attempt=2)
    task = await system.finishes(task_id)

    assert second.time - killed_at <= CHILD_RERUN_SECONDS
    assert "COMPLETED" == task["status"]
    assert ["RETRIED", "COMPLETED"] == [a["outcome"] for a in task["attempts"]]
    assert "SIGKILL" in task["attempts"][0]["error"]["message"]


async def test_a_frozen_worker_is_fenced_and_comes_back_under_a_new_id(system: System) -> None:
    """
    After SIGSTOP past the lease and SIGCONT, what the worker finished is discarded, each task
    completes once, elsewhere, and the worker returns under a new id.
    """
    _, workers, _ = await system.start(workers=2, heartbeat_seconds=0.25, lease_seconds=1.5)
    names = ("work", "work-in-thread", "work-in-process") * 2
    task_ids = await system.submit_batch([{"name": n, "payload": {"seconds": 2}} for n in names])
    starts = [await system.journal.wait_for("start", task_id) for task_id in task_ids]
    frozen = owner(workers, starts[0].pid)
    its_own = [s.task_id for s in starts if owner(workers, s.pid) is frozen]

    frozen.send(signal.SIGSTOP)
    held = [t for t in its_own if (await system.get(t))["status"] == "RUNNING"]
    assert held
    for task_id in held:
        await system.journal.wait_for("start", task_id, attempt=2)
    frozen.send(signal.SIGCONT)
    former = frozen.lines[0]["worker_id"]
    comeback = await frozen.log_event("process.started", after=1)
    assert {"completed": len(task_ids)} == await system.all_terminal(task_ids)

    assert comeback["worker_id"] != former
    await system.knows_worker(comeback["worker_id"])
    assert frozen.has_logged("worker.fenced")
    for task_id in held:
        task = await system.get(task_id)
        assert {"attempt": 2} == task["result"]
        assert task["worker_id"] != former
        assert ["RETRIED", "COMPLETED"] == [a["outcome"] for a in task["attempts"]]
    query = "SELECT lost_at IS NOT NULL AS lost FROM asyncflow.workers WHERE id = $1"
    assert (await system.rows(query, former))[0]["lost"]


async def test_a_task_that_kills_its_worker_fails_and_its_neighbours_complete(
    system: System,
) -> None:
    """
    A poison task that takes whole workers down ends FAILED; its neighbours run again.
    """
    await asyncio.gather(system.start_api(), system.start_maintenance())
    # Workers that die are restarted.
    await system.run("worker", "--processes", "2", "--handlers", str(HANDLERS))
    await system.locks_prove_death()
    neighbours = [await system.submit("work", {"seconds": 0.5}) for _ in range(6)]
    poison = await system.submit("kill-worker")

    task = await system.finishes(poison, timeout_seconds=40)

    assert "FAILED" == task["status"]
    assert "WorkerLost" == task["error"]["kind"]
    assert ["RETRIED", "FAILED"] == [a["outcome"] for a in task["attempts"]]
    assert {"completed": 6} == await system.all_terminal(neighbours)


def owner(workers: list[Process], pid: int) -> Process:
    """
    The worker that `pid` is or descends from.
    """
    family = {pid, *(parent.pid for parent in psutil.Process(pid).parents())}
    return next(worker for worker in workers if worker.pid in family)
