"""
Several workers under one parent: `asyncflow worker --processes`.
"""

from __future__ import annotations

import asyncio
import errno
import signal
from pathlib import Path
from typing import Any

import pytest

from asyncflow.processes.supervisor import SupervisedProcess, Supervisor
from tests.support.programs import environment, finished, running

STARTED = r"process\.started"


@pytest.fixture
def env(database_url: str) -> dict[str, str]:
    """
    The environment of a worker.
    """
    return environment(database_url=database_url, log_format="console", lease_seconds=5)


def test_a_killed_worker_is_started_again(env: dict[str, str], tmp_path: Path) -> None:
    """
    A killed worker is restarted and an ERROR is logged, while the others continue.
    """
    with running("worker", "--processes", "2", folder=tmp_path, env=env) as parent:
        parent.until(STARTED, times=2)
        parent.family()[0].kill()
        parent.until(r"process\.died.*killed by SIGKILL")
        parent.until(STARTED, times=3)
        parent.send(signal.SIGTERM)

        assert 0 == parent.ended()
        assert [] == parent.survivors()


def test_workers_that_refuse_to_run_end_their_parent(env: dict[str, str], tmp_path: Path) -> None:
    """
    Workers that refuse to start are not restarted, which could not help; the parent exits.
    """
    arguments = ("worker", "--processes", "2", "--handlers", "nowhere.tasks")

    ended = finished(*arguments, folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert "No module named 'nowhere.tasks'" in ended.stderr


def test_options_reach_every_worker(env: dict[str, str], tmp_path: Path) -> None:
    """
    Options override the environment in every worker, even if they equal the defaults.
    """
    env = {**env, "ASYNCFLOW_WORKER_SLOTS": "3"}
    arguments = ("--processes", "2", "--slots", "10", "--queues", "slow,fast")

    with running("worker", *arguments, folder=tmp_path, env=env) as parent:
        line = parent.until(STARTED, times=2).string

        assert "slots=10" in line
        assert "queues=slow,fast" in line


def test_workers_end_when_their_parent_is_killed(env: dict[str, str], tmp_path: Path) -> None:
    """
    Workers whose parent is killed stop gracefully and log it.
    """
    with running("worker", "--processes", "2", folder=tmp_path, env=env) as parent:
        parent.until(STARTED, times=2)
        parent.send(signal.SIGKILL)

        assert [] == parent.survivors()
        parent.until(r"process\.stopped", times=2)


async def test_a_child_that_cannot_be_started_now_is_started_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A temporary shortage of memory or processes does not end the other children.
    """
    start = asyncio.create_subprocess_exec
    tries = 0

    async def refuse_once(*arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return await start(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse_once)
    with Supervisor(grace_seconds=1) as supervisor:
        assert 0 == await supervisor.run([SupervisedProcess("version", ["version"])])

    assert 2 == tries
