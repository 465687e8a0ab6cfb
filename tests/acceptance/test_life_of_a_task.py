"""
From POST to COMPLETED, as a user sees it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.acceptance.conftest import show_logs
from tests.support import postgres
from tests.support.system import System

CURL = """
    curl -sS -i -X POST {url}/tasks -H 'Content-Type: application/json' \\
         -d '{{"name": "sample-task"}}'
"""


async def follow_one_task(system: System) -> None:
    """
    The seed scenario: follow a first task through its life.
    """
    response = await system.client.post(
        f"{system.url}/tasks", json={"name": "sample-task", "payload": {"seconds": 1}}
    )

    assert 202 == response.status_code
    submitted = response.json()
    task_id = submitted["id"]
    assert 7 == UUID(task_id).version
    assert response.headers["Location"] == f"/tasks/{task_id}"
    assert "sample-task" == submitted["name"]
    assert "PENDING" == submitted["status"]

    running = await system.reaches(task_id, "RUNNING")
    assert 1 == running["attempt"]
    assert ["RUNNING"] == [a["outcome"] for a in running["attempts"]]
    assert running["result"] is None

    task = await system.finishes(task_id)
    assert "COMPLETED" == task["status"]
    assert {"message": "Processed for 1 seconds.", "seconds": 1.0} == task["result"]
    assert {"seconds": 1} == task["payload"]
    assert task["error"] is None
    check_times(task)
    [attempt] = task["attempts"]
    assert "COMPLETED" == attempt["outcome"]
    assert attempt["worker_id"] == running["worker_id"]
    assert 1.0 <= attempt["duration_seconds"] < 2.0


def check_times(task: dict[str, Any]) -> None:
    """
    Check that the timestamps are in order and agree with the timings.
    """
    created, started, finished = (
        datetime.fromisoformat(task[name]) for name in ("created_at", "started_at", "finished_at")
    )
    assert created < started < finished
    timings = task["timings"]
    assert timings["wait_seconds"] == pytest.approx((started - created).total_seconds(), abs=0.001)
    assert timings["run_seconds"] == pytest.approx((finished - started).total_seconds(), abs=0.001)
    assert timings["total_seconds"] == pytest.approx(
        (finished - created).total_seconds(), abs=0.001
    )


@pytest.mark.every_rabbitmq
async def test_a_task_is_accepted_run_and_completed(system: System) -> None:
    """
    A submission is answered 202 with a PENDING task, which completes and keeps its history.
    """
    await system.start()

    await follow_one_task(system)


@pytest.mark.any_engine
async def test_the_curl_line_of_the_readme_completes(system: System) -> None:
    """
    `sample-task` without a payload takes five seconds and reports its progress.
    """
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    await system.start()
    answer = subprocess.run(
        ["sh", "-c", CURL.format(url=system.url)], capture_output=True, text=True
    ).stdout
    assert answer.startswith("HTTP/1.1 202")
    [location] = [
        line.split()[1] for line in answer.splitlines() if line.lower().startswith("location")
    ]
    task_id = location.rpartition("/")[2]

    async def reports_progress() -> bool:
        progress = (await system.get(task_id))["progress"]
        return progress is not None and 0 < progress["fraction"] < 1

    await system.until(reports_progress, "it reports progress")
    task = await system.finishes(task_id)

    assert "COMPLETED" == task["status"]
    assert 5.0 == task["result"]["seconds"]
    assert 5.0 <= task["timings"]["run_seconds"] < 6.0


@pytest.fixture(scope="module")
def oldest_database_url() -> Iterator[str]:
    """
    A database on the oldest supported PostgreSQL.
    """
    with postgres.running_server(postgres.OLDEST) as server:
        yield server.create_database()


@pytest.fixture
async def system_on_oldest(
    oldest_database_url: str,
    vhost_url: str | None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> AsyncIterator[System]:
    """
    A system on the oldest PostgreSQL, with no process started yet.
    """
    async with System(
        database_url=oldest_database_url, broker_url=vhost_url, folder=tmp_path
    ) as system:
        yield system
    show_logs(request, system)


async def test_a_task_completes_on_the_oldest_postgres(system_on_oldest: System) -> None:
    """
    The whole life of a task works on the oldest supported PostgreSQL.
    """
    await system_on_oldest.start()

    await follow_one_task(system_on_oldest)
