"""
PgBouncer in transaction mode between PostgreSQL and all of AsyncFlow's processes: tasks go through
their whole life, a killed worker is detected, and an outage of PgBouncer is survived.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from asyncflow.findings import Verdict
from asyncflow.store.database import PLANNER, Database
from asyncflow.store.inspection import inspect
from tests.acceptance.resources.conftest import a_system
from tests.support.pgbouncer import SESSIONS, Pooler, running_pooler
from tests.support.ports import free_port
from tests.support.postgres import PostgresServer
from tests.support.system import System

FLOWING_AGAIN_SECONDS = 30.0
START_SECONDS_MAX = 60.0


@pytest.fixture(scope="module")
def pooler(own_server: PostgresServer) -> Iterator[Pooler]:
    """
    A PgBouncer. A test that kills it must start it again.
    """
    with running_pooler(own_server) as pooler:
        yield pooler


@pytest.fixture
def unmigrated_url(own_server: PostgresServer) -> Iterator[str]:
    """
    The direct URL of an empty database.
    """
    url = own_server.create_empty_database()
    yield url
    own_server.drop_database(url)


@asynccontextmanager
async def behind(
    pooler: Pooler,
    database_url: str,
    broker_url: str | None,
    request: pytest.FixtureRequest,
    folder: Path,
) -> AsyncIterator[System]:
    """
    A system whose processes connect through the pooler; the test itself connects directly.
    """
    async with a_system(request, folder, database_url, broker_url) as system:
        system.settings |= {"database_url": pooler.url(database_url), "database_pooler": True}
        await system.command("migrate")
        yield system


@pytest.fixture
async def pooled(
    unmigrated_url: str,
    pooler: Pooler,
    vhost_url: str | None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> AsyncIterator[System]:
    """
    A system behind the pooler, on both engines.
    """
    async with behind(pooler, unmigrated_url, vhost_url, request, tmp_path) as system:
        yield system


@pytest.fixture
async def pooled_alone(
    unmigrated_url: str, pooler: Pooler, request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[System]:
    """
    Like `pooled`, on PostgreSQL alone.
    """
    async with behind(pooler, unmigrated_url, None, request, tmp_path) as system:
        yield system


async def sessions(system: System) -> int:
    """
    Number of sessions in the system's database, not counting this one.
    """
    [row] = await system.rows("""
        SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database()
           AND backend_type = 'client backend'
           AND pid <> pg_backend_pid()
    """)
    return int(row["count"])


async def test_tasks_live_their_whole_life_behind_a_pooler(pooled: System) -> None:
    """
    Tasks run in every isolation, are retried, delayed, failed and redriven, and are cancelled while
    they wait and while they run; in numbers, so that all processes share few sessions.
    """
    assert "already" in await pooled.command("migrate")
    await pooled.start(workers=2)
    many = await pooled.submit_batch([{"name": "work", "payload": {"seconds": 0}}] * 500)
    good = [
        await pooled.submit("work"),
        await pooled.submit("work-in-thread"),
        await pooled.submit("work-in-process"),
        await pooled.submit("sidelined"),
        await pooled.submit("flaky", {"failures": 2}),
        await pooled.submit("work", delay_seconds=0.5),
    ]
    broken = await pooled.submit("broken", {"until_attempt": 3})
    waiting = await pooled.submit("work", delay_seconds=1_000)
    running = await pooled.submit("work", {"seconds": 60})
    await pooled.journal.wait_for("start", running)

    cancelled = [await pooled.post(task_id, "cancel") for task_id in (waiting, running)]
    failed = await pooled.finishes(broken)
    redriven = await pooled.post(broken, "redrive")

    assert [200, 202] == [response.status_code for response in cancelled]
    assert {"cancelled": 2} == await pooled.all_terminal([waiting, running])
    assert ("FAILED", 202) == (failed["status"], redriven.status_code)
    completed = [*many, *good, broken]
    assert {"completed": len(completed)} == await pooled.all_terminal(completed)
    assert 3 == (await pooled.get(good[4]))["attempt"]
    assert broken in await pooled.command("task", "list", "--name", "broken", "--json")
    assert SESSIONS >= await sessions(pooled)


async def test_a_task_of_a_killed_worker_runs_again_behind_a_pooler(pooled_alone: System) -> None:
    """
    Without session locks, the worker is declared dead once its lease expires.
    """
    _, [worker], _ = await pooled_alone.start(heartbeat_seconds=0.25, lease_seconds=1.5)
    await pooled_alone.locks_prove_death()
    task_id = await pooled_alone.submit("work", {"seconds": 1})
    await pooled_alone.journal.wait_for("start", task_id)

    await worker.kill()
    await pooled_alone.start_worker()
    task = await pooled_alone.finishes(task_id)

    assert "COMPLETED" == task["status"]
    assert {"attempt": 2} == task["result"]
    assert "WorkerLost" == task["attempts"][0]["error"]["kind"]


async def test_a_pooler_that_dies_costs_time_and_no_task(
    pooled_alone: System, pooler: Pooler
) -> None:
    """
    The API answers 503 while the pooler is away; all processes reconnect to its successor on their
    own.
    """
    await pooled_alone.start(workers=2)

    async with pooled_alone.load(payload={"seconds": 0.2}) as load:
        await load.has_accepted(20)
        await asyncio.to_thread(pooler.kill)
        try:
            await load.is_refused()
        finally:
            await asyncio.to_thread(pooler.start)
        await load.has_accepted(5)
        await pooled_alone.finishes(load.accepted[-1], timeout_seconds=FLOWING_AGAIN_SECONDS)

    await pooled_alone.has_lost_nothing(load)
    assert [] == await pooled_alone.punished()


async def test_a_forgotten_setting_is_named(pooled_alone: System) -> None:
    """
    A worker that mistakes the pooler for PostgreSQL names the setting that is missing.
    """
    worker = await pooled_alone.run("worker", database_pooler=False)

    assert 2 == await worker.exit_status()
    assert "Set ASYNCFLOW_DATABASE_POOLER=true" in worker.output


@pytest.mark.parametrize(
    ("mode", "is_said", "verdict", "fact"),
    [
        ("transaction", False, Verdict.WRONG, "shares PostgreSQL sessions between transactions"),
        ("transaction", True, Verdict.DOUBTFUL, "planner's settings"),
        ("session", False, Verdict.DOUBTFUL, "planner's settings"),
    ],
)
async def test_a_pooler_that_takes_everything_is_found_out(
    own_server: PostgresServer,
    own_database_url: str,
    mode: str,
    is_said: bool,
    verdict: Verdict,
    fact: str,
) -> None:
    """
    A pooler that swallows connection settings is detected, with whether it shares sessions, by the
    sessions behind it.
    """
    settings = {"pool_mode": mode, "ignore_startup_parameters": ", ".join(PLANNER)}
    with running_pooler(own_server, settings=settings) as pooler:
        async with Database(pooler.url(own_database_url), pooler=is_said) as db:
            findings = await inspect(db, timeout_seconds=10, connections=1)

    (found,) = [finding for finding in findings if finding.what == "PostgreSQL pooler"]
    assert verdict is found.verdict
    assert fact in found.sentence


async def test_a_pooler_of_sessions_serves_what_needs_sessions(
    own_server: PostgresServer,
    own_database_url: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """
    Wake-ups and locks work through a session pooler that passes our settings on: a killed worker is
    detected long before its lease expires.
    """
    settings = {
        "pool_mode": "session",
        "default_pool_size": "50",
        "ignore_startup_parameters": ", ".join(PLANNER),
    }
    with running_pooler(own_server, settings=settings) as pooler:
        url = pooler.url(own_database_url)
        async with a_system(request, tmp_path, url) as system:
            _, [worker], _ = await system.start(lease_seconds=60)
            await system.locks_prove_death()
            task_id = await system.submit("work", {"seconds": 1})
            await system.journal.wait_for("start", task_id)

            await worker.kill()
            await system.start_worker()

            assert {"attempt": 2} == (await system.finishes(task_id))["result"]


async def test_dev_runs_behind_a_pooler(
    unmigrated_url: str, pooler: Pooler, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """
    `asyncflow dev` migrates the database it is given and runs everything on it.
    """
    async with a_system(request, tmp_path, unmigrated_url) as system:
        system.settings |= {"database_url": pooler.url(unmigrated_url), "database_pooler": True}
        port = free_port()
        dev = await system.run("dev", "--port", str(port), "--database-url", "--yes")
        url = f"http://127.0.0.1:{port}"
        await system.answers(
            lambda: system.client.get(f"{url}/health/ready"), timeout_seconds=START_SECONDS_MAX
        )
        await system.reaches_api(url)

        task_id = await system.submit("sample-task", {"seconds": 0})

        assert "COMPLETED" == (await system.finishes(task_id))["status"]
        dev.send(signal.SIGTERM)
        assert 0 == await dev.exit_status()
