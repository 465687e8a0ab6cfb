"""
A handler forks a child that stays: signals and sessions still belong to the worker alone.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from asyncflow.worker.isolation.nursery import NURSERY
from tests.acceptance.test_shutdown import no_sessions
from tests.support.process import Process
from tests.support.system import HANDLERS, System

HABITS_FILE = Path(__file__).with_name("habits.py")


def forked_by(worker: Process) -> list[psutil.Process]:
    """
    Processes forked by handlers: all children of the worker except the one it starts itself.
    """
    children = psutil.Process(worker.pid).children()
    return [child for child in children if NURSERY not in child.cmdline()]


@pytest.mark.parametrize("where", ["loop", "thread"])
async def test_a_signal_to_the_group_stops_a_worker_once(
    database_url: str, tmp_path: Path, where: str
) -> None:
    """
    A signal to the process group, as service managers and terminals send it, lets the worker finish
    what it runs, and the child ends.
    """
    async with System(database_url=database_url, broker_url=None, folder=tmp_path) as system:
        await system.start_api()
        worker = await system.start_worker(handlers=(HANDLERS, HABITS_FILE), test_isolation=where)
        await system.finishes(await system.submit(f"forks-and-stays.{where}"))
        [child] = forked_by(worker)
        running = await system.submit("work", {"seconds": 1})
        await system.journal.wait_for("start", running)

        os.killpg(worker.pid, signal.SIGTERM)

        assert 0 == await worker.exit_status()
        task = await system.get(running)
        assert ("COMPLETED", 1) == (task["status"], task["attempt"])
        assert not worker.has_logged("process.force_quit")
        assert [child] == psutil.wait_procs([child], timeout=20)[0]


async def test_a_signal_to_a_child_does_not_stop_its_worker(
    database_url: str, tmp_path: Path
) -> None:
    """
    A signal to a forked child ends only the child, whichever thread forked it.
    """
    async with System(database_url=database_url, broker_url=None, folder=tmp_path) as system:
        await system.start_api()
        worker = await system.start_worker(handlers=(HABITS_FILE,), test_isolation="thread")
        await system.finishes(await system.submit("forks-and-stays.thread"))
        [child] = forked_by(worker)

        child.send_signal(signal.SIGTERM)
        await system.until(lambda: has_ended(child), "the child has ended")
        after = await system.finishes(await system.submit("forks.thread"))

        assert "COMPLETED" == after["status"]
        assert not worker.has_logged("process.stopping")


async def test_a_forked_child_does_not_keep_a_killed_workers_sessions(
    database_url: str, tmp_path: Path
) -> None:
    """
    The advisory lock that proves a worker dead is released even if a forked child lives on.
    """
    async with System(database_url=database_url, broker_url=None, folder=tmp_path) as system:
        worker = await system.start_worker(handlers=(HABITS_FILE,), test_isolation="thread")
        api = await system.start_api()
        await system.finishes(await system.submit("forks-and-stays.thread"))
        await api.kill()
        [child] = forked_by(worker)

        await worker.kill()

        await system.until(lambda: no_sessions(system), "no session is left")
        assert child.is_running()
        child.kill()


async def has_ended(process: psutil.Process) -> bool:
    """
    Whether the process has ended, reaped or not.
    """
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
