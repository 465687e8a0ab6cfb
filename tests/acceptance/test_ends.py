"""
A worker exits with the intended status, whatever state it is in.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support import debian
from tests.support.programs import environment
from tests.support.system import System

HERE = Path(__file__).parent
HANDLERS, HABITS = HERE / "ending_handlers.py", HERE / "habits.py"


@pytest.fixture
def alone(database_url: str, tmp_path: Path) -> System:
    """
    A system on PostgreSQL alone, with no process started yet.
    """
    return System(database_url=database_url, broker_url=None, folder=tmp_path)


async def test_an_exhausted_worker_ends_with_status_70_whatever_is_left(alone: System) -> None:
    """
    The worker exits despite a thread, an executor, an unstoppable task and a child process: waiting
    for them would keep its supervisor from starting another.
    """
    async with alone as system:
        await system.start_api()
        worker = await system.start_worker(
            handlers=[HABITS],
            # A fresh process: one forked for a test might not be allowed children of its own.
            python=Path(sys.executable),
            test_isolation="loop",
            worker_slots=1,
            stall_seconds=1,
            cancel_grace_seconds=0.1,
        )
        for habit in ("thread", "executor", "stubborn-task", "forked-process"):
            article = "an" if habit == "executor" else "a"
            task = await system.finishes(await system.submit(f"keeps-{article}-{habit}.loop"))
            assert "COMPLETED" == task["status"]
        stuck = await system.submit("stubborn.loop")
        await system.reaches(stuck, "RUNNING")

        await system.post(stuck, "cancel")

        assert 70 == await worker.exit_status()
        assert worker.has_logged("worker.exhausted")


async def test_a_handler_that_blocks_the_event_loop_does_not_keep_a_worker_from_ending(
    alone: System,
) -> None:
    """
    A blocked loop cannot react to the signal, but the process exits when its grace period is over.
    """
    async with alone as system:
        await system.start_api()
        worker = await system.start_worker(handlers=[HANDLERS], shutdown_grace_seconds=0.5)
        await system.reaches(await system.submit("block-the-loop"), "RUNNING")

        worker.send(signal.SIGTERM)

        assert 0 == await worker.exit_status()
        assert worker.has_logged("process.blocked")


async def test_a_frozen_worker_comes_back_while_threads_of_handlers_are_busy(
    alone: System,
) -> None:
    """
    Threads that handlers keep busy by `asyncio.to_thread` do not keep a frozen worker from
    returning.
    """
    async with alone as system:
        await system.start_api()
        worker = await system.start_worker(
            handlers=[HANDLERS], lease_seconds=1, heartbeat_seconds=0.1
        )
        task_id = await system.submit("wait-in-threads", {"count": 40})
        await system.reaches(task_id, "RUNNING")
        first = worker.lines[0]["worker_id"]

        worker.send(signal.SIGSTOP)
        await asyncio.sleep(1.5)  # longer than its lease
        worker.send(signal.SIGCONT)

        again = await worker.log_event("process.started", after=1)
        assert first != again["worker_id"]


async def test_a_worker_that_loads_its_handlers_ends_with_status_0(
    alone: System, tmp_path: Path
) -> None:
    """
    A worker stopped while it loads its handlers has started nothing, so it exits with status 0.
    """
    loading = tmp_path / "loading"
    async with alone as system:
        worker = await system.run(
            "worker", "--handlers", str(HANDLERS), test_slow_import=str(loading)
        )
        await system.until(lambda: exists(loading), "it loads its handlers")

        worker.send(signal.SIGTERM)

        assert 0 == await worker.exit_status()


@pytest.mark.skipif(not debian.may_use_trees(), reason="only root may make a process the first")
async def test_the_first_process_of_a_container_hears_signals_early(
    alone: System, tmp_path: Path
) -> None:
    """
    PID 1 handles signals from the start: the kernel drops those that PID 1 has no handler for.
    """
    loading = tmp_path / "loading"
    async with alone as system:
        with contained(system, test_slow_import=loading) as unshare:
            await system.until(lambda: exists(loading), "it loads its handlers")
            first_process_in(unshare).send_signal(signal.SIGTERM)

            assert 0 == await asyncio.to_thread(unshare.wait, 20)


@pytest.mark.skipif(not debian.may_use_trees(), reason="only root may make a process the first")
async def test_the_first_process_of_a_container_reaps_orphans(alone: System) -> None:
    """
    PID 1 reaps orphans and leaves alone the children that something waits for.
    """
    async with alone as system:
        await system.start_api()
        with contained(system) as unshare:
            for _ in range(3):
                task = await system.finishes(await system.submit("leave-an-orphan"))
                assert "COMPLETED" == task["status"]

            async def has_none() -> bool:
                family = first_process_in(unshare).children(recursive=True)
                return all(process.status() != psutil.STATUS_ZOMBIE for process in family)

            await system.until(has_none, "no zombie is left")
            first_process_in(unshare).send_signal(signal.SIGTERM)
            assert 0 == await asyncio.to_thread(unshare.wait, 20)


async def test_closed_standard_streams_are_not_given_to_connections(alone: System) -> None:
    """
    With `worker <&- >&- 2>&-`, the next file opened would otherwise become standard error.
    """
    async with alone as system:
        await system.start_api()
        with started(system, "sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh") as worker:
            await system.finishes(await system.submit("leave-an-orphan"))
            streams = [os.readlink(f"/proc/{worker.pid}/fd/{number}") for number in range(3)]
            worker.send_signal(signal.SIGTERM)

            assert 0 == await asyncio.to_thread(worker.wait, 20)
            assert [os.devnull] * 3 == streams


@contextmanager
def started(system: System, *before: str, **settings: object) -> Iterator[subprocess.Popen[bytes]]:
    """
    A worker whose command line begins with `before`.
    """
    command = [sys.executable, "-m", "asyncflow", "worker", "--handlers", str(HANDLERS)]
    env = environment(**{**system.settings, **settings})
    process = subprocess.Popen([*before, *command], env=env, cwd=system.folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def contained(
    system: System, **settings: object
) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """
    A worker that runs as PID 1 of a container.
    """
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    return started(system, *unshare, **settings)


def first_process_in(unshare: subprocess.Popen[bytes]) -> psutil.Process:
    """
    The container's PID 1 as seen from outside.
    """
    [first] = psutil.Process(unshare.pid).children()
    return first


async def exists(file: Path) -> bool:
    """
    Whether the file exists.
    """
    return await asyncio.to_thread(file.exists)
