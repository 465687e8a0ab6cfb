"""
Startup: on a wrong schema, before the database, before the broker, and concurrent migrations.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from asyncflow.store.grants import grants_for
from tests.acceptance.conftest import show_logs
from tests.support import postgres
from tests.support.ports import free_port
from tests.support.postgres import PostgresServer
from tests.support.process import Process
from tests.support.system import HANDLERS, System


@pytest.fixture
async def unmigrated(
    empty_database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[System]:
    """
    A system on an empty database.
    """
    async with System(database_url=empty_database_url, broker_url=None, folder=tmp_path) as system:
        yield system
    show_logs(request, system)


async def refusals(system: System) -> list[str]:
    """
    What each kind of process prints when it refuses to start.
    """
    commands = (["api", "--port", str(free_port())], ["worker"], ["maintenance"])
    started = [await system.run(*command) for command in commands]
    assert [2, 2, 2] == [await process.exit_status() for process in started]
    return [process.output for process in started]


async def test_every_process_refuses_a_database_without_schema(unmigrated: System) -> None:
    """
    Every process exits with status 2 and one sentence that says what to do, without a traceback.
    """
    for said in await refusals(unmigrated):
        assert said.startswith("asyncflow: ")
        assert "asyncflow migrate" in said
        assert 1 == len(said.splitlines())


async def test_every_process_refuses_a_malformed_broker_url(
    database_url: str, tmp_path: Path
) -> None:
    """
    A malformed URL is refused with one sentence, without the password, instead of being retried
    forever.
    """
    url = "amqp://me:s3#cret@host/"
    async with System(database_url=database_url, broker_url=url, folder=tmp_path) as system:
        for said in await refusals(system):
            assert said.startswith("asyncflow: ASYNCFLOW_BROKER_URL: must look like amqp://")
            assert "s3" not in said
            assert 1 == len(said.splitlines())


async def test_every_process_refuses_a_database_of_another_encoding(
    postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """
    The refusal names the encoding and what to create instead.
    """
    url = await asyncio.to_thread(postgres_server.create_empty_database, encoding="LATIN1")
    async with System(database_url=url, broker_url=None, folder=tmp_path) as system:
        for said in await refusals(system):
            assert "is LATIN1" in said
            assert "ENCODING 'UTF8'" in said
            assert "Traceback" not in said
    await asyncio.to_thread(postgres_server.drop_database, url)


async def test_processes_wait_for_their_rights_and_then_work(
    postgres_server: PostgresServer,
    database_url: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """
    Each process says what its role lacks and which command prints the grants, and those grants
    suffice for all processes.
    """
    role_url = await asyncio.to_thread(postgres_server.create_role, database_url)
    role = str(urlsplit(role_url).username)
    async with System(database_url=role_url, broker_url=None, folder=tmp_path) as system:
        started = await asyncio.gather(
            system.run("api", "--port", str(free_port())),
            system.run("worker", "--handlers", str(HANDLERS)),
            system.run("maintenance"),
        )
        for process in started:
            line = await process.complains("lacks USAGE on schema asyncflow")
            assert f"`asyncflow grants {role}`" in line["reason"]

        await execute(database_url, grants_for(role))

        await work_together(system, started)
    show_logs(request, system)
    await asyncio.to_thread(postgres_server.drop_role, role_url)


async def test_a_process_waits_for_a_database_that_is_missing(
    postgres_server: PostgresServer,
    database_url: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """
    A process waits for a missing database, and names it and the statement that creates it.
    """
    name = urlsplit(database_url).path[1:]
    server = postgres_server.cluster.url
    await execute(server, f"ALTER DATABASE {name} RENAME TO {name}_later")
    async with System(database_url=database_url, broker_url=None, folder=tmp_path) as system:
        maintenance = await system.run("maintenance")
        line = await maintenance.complains(f"The server has no database {name}.")
        assert f"CREATE DATABASE {name}" in line["reason"]

        await execute(server, f"ALTER DATABASE {name}_later RENAME TO {name}")

        await maintenance.log_event("process.started")
    show_logs(request, system)


async def test_every_process_refuses_a_newer_schema(system: System) -> None:
    """
    An old version refuses to touch a database that a newer one has migrated.
    """
    await execute(
        system.database_url,
        "UPDATE asyncflow.schema_version SET version_num = '9999', compatible_from = '9999'",
    )

    for said in await refusals(system):
        assert "9999" in said
        assert 1 == len(said.splitlines())


async def test_migrations_may_run_at_the_same_time(unmigrated: System) -> None:
    """
    Five concurrent migrations all succeed, and the schema is usable right after.
    """
    migrations = [await unmigrated.run("migrate") for _ in range(5)]

    assert [0] * 5 == [await migration.exit_status() for migration in migrations]
    again = await unmigrated.command("migrate")
    assert "already" in again
    await unmigrated.start()
    task_id = await unmigrated.submit("work")
    assert "COMPLETED" == (await unmigrated.finishes(task_id))["status"]


@pytest.fixture
def absent_server() -> Iterator[PostgresServer]:
    """
    A PostgreSQL that has been created but not started.
    """
    with postgres.running_server(postgres.EMBEDDED) as server:
        yield server


async def test_processes_wait_for_the_database_and_then_work(
    absent_server: PostgresServer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """
    Each process started before PostgreSQL says that it waits, and needs no restart.
    """
    url = await asyncio.to_thread(absent_server.create_database)
    await asyncio.to_thread(absent_server.cluster.stop)
    async with System(database_url=url, broker_url=None, folder=tmp_path) as system:
        started = await asyncio.gather(
            system.run("api", "--port", str(free_port())),
            system.run("worker", "--handlers", str(HANDLERS)),
            system.run("maintenance"),
        )
        for process in started:
            await process.log_event("database.unavailable")

        await asyncio.to_thread(absent_server.cluster.start)

        await work_together(system, started)
    show_logs(request, system)


async def test_a_process_that_waits_for_the_database_stops_at_a_signal(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """
    A process that waits for the database still exits with status 0.
    """
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/nothing"
    async with System(database_url=url, broker_url=None, folder=tmp_path) as system:
        started = [
            await system.run("api", "--port", str(free_port())),
            await system.run("worker"),
            await system.run("maintenance"),
        ]
        for process in started:
            await process.log_event("database.unavailable")
            process.send(signal.SIGTERM)

        assert [0, 0, 0] == [await process.exit_status() for process in started]
    show_logs(request, system)


async def work_together(system: System, started: Sequence[Process]) -> None:
    """
    Complete a task on processes that were started without waiting for them.
    """
    api, worker, _ = started
    line = await api.log_event("process.started")
    await worker.log_event("process.started")
    await system.reaches_api(line["url"])
    task_id = await system.submit("work")
    assert "COMPLETED" == (await system.finishes(task_id))["status"]


async def test_a_missing_handler_module_is_one_sentence(system: System) -> None:
    """
    A worker that cannot load its handlers exits with status 2 and names the module.
    """
    worker = await system.run("worker", "--handlers", "no_such_module")

    assert 2 == await worker.exit_status()
    assert "no_such_module" in worker.output
    assert "Traceback" not in worker.output


async def execute(url: str, statement: str) -> None:
    """
    Change a database directly, bypassing AsyncFlow.
    """
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
