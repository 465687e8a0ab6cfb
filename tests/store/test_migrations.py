"""
Migrating: safe to run by many, beside other people's tables, and never backwards.
"""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.errors import SchemaMismatch, StatementRefused, StoreUnavailable
from asyncflow.store import tasks
from asyncflow.store.database import Database
from asyncflow.store.migrations import migrate
from asyncflow.store.schema import SCHEMA_VERSION, check_schema, schema_version
from builders import new_task
from services.postgres import PostgresServer

NEWER = "9999"


async def test_five_at_once_migrate_an_empty_database_once(empty_database_url: str) -> None:
    """
    As when a deployment starts five processes: all return, the schema is whole.
    """
    await asyncio.gather(*(migrate(empty_database_url) for _ in range(5)))

    async with Database(empty_database_url) as db:
        await check_schema(db)
        assert 1 == await db.fetchval("SELECT count(*) FROM asyncflow.tenants")
        await tasks.submit(db, [new_task()])


async def test_migrating_again_changes_nothing_and_tells_the_version(
    empty_database_url: str,
) -> None:
    """
    The first call finds no schema, the second this version's.
    """
    first = await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        await tasks.submit(db, [new_task()])
        second = await migrate(empty_database_url)

        assert (None, SCHEMA_VERSION) == (first, second)
        assert 1 == await db.fetchval("SELECT count(*) FROM asyncflow.tasks")


async def test_a_database_may_belong_to_an_application_too(empty_database_url: str) -> None:
    """
    Its tables, even of our names, stay as they are; we touch only our schema.
    """
    async with Database(empty_database_url) as db:
        for statement in (
            "CREATE TABLE tasks (mine int)",
            "CREATE TABLE alembic_version (version_num text)",
            "INSERT INTO alembic_version VALUES ('theirs')",
        ):
            await db.execute(statement)

        await migrate(empty_database_url)

        await tasks.submit(db, [new_task()])
        assert 0 == await db.fetchval("SELECT count(*) FROM public.tasks")
        assert "theirs" == await db.fetchval("SELECT version_num FROM public.alembic_version")
        ours = await db.fetch(
            "SELECT DISTINCT schemaname FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema', 'public')"
        )
        assert ["asyncflow"] == [row["schemaname"] for row in ours]


async def test_a_database_without_our_schema_says_how_to_get_it(empty_database_url: str) -> None:
    """
    One sentence with the command to run.
    """
    async with Database(empty_database_url) as db:
        assert await schema_version(db) is None

        with pytest.raises(SchemaMismatch) as mismatch:
            await check_schema(db)

    assert (
        "The database has no AsyncFlow schema; "
        "run `asyncflow migrate` with the version you are deploying."
    ) == str(mismatch.value)


@pytest.mark.parametrize("version", ["0000", NEWER])
async def test_another_version_of_the_schema_is_named(fresh_db: Database, version: str) -> None:
    """
    Older or newer: both versions are in the sentence.
    """
    await fresh_db.execute(f"UPDATE asyncflow.schema_version SET version_num = '{version}'")

    with pytest.raises(SchemaMismatch) as mismatch:
        await check_schema(fresh_db)

    assert (version, SCHEMA_VERSION) == (mismatch.value.found, mismatch.value.needed)
    assert f"has schema {version}, this version needs {SCHEMA_VERSION}" in str(mismatch.value)


async def test_a_newer_schema_is_never_touched(fresh_db: Database, database_url: str) -> None:
    """
    An old release that is started by mistake must not migrate backwards.
    """
    await fresh_db.execute(f"UPDATE asyncflow.schema_version SET version_num = '{NEWER}'")

    with pytest.raises(SchemaMismatch):
        await migrate(database_url)

    assert NEWER == await schema_version(fresh_db)


async def test_a_database_that_is_down_is_unavailable() -> None:
    """
    Not a traceback from below: the caller may wait and try again.
    """
    with pytest.raises(StoreUnavailable):
        await migrate("postgresql://nobody@127.0.0.1:1/nothing")


async def test_a_database_that_is_missing_is_unavailable(postgres_server: PostgresServer) -> None:
    """
    Someone may be creating it just now.
    """
    url = postgres_server.cluster.url.replace("/postgres?", "/missing?")

    with pytest.raises(StoreUnavailable, match="missing"):
        await migrate(url)


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("state = 'running'", "running_has_a_lease"),
        ("lease_id = gen_random_uuid()", "waiting_has_no_lease"),
        ("queued_at = now()", "only_pending_is_not_queued"),
        ("state = 'queued'", "only_pending_is_not_queued"),
        ("finished_at = now()", "finished_has_a_time"),
        ("state = 'failed'", "finished_has_a_time"),
        ("priority = 10", "priority"),
    ],
)
async def test_the_schema_refuses_rows_that_the_code_assumes_away(
    db: Database, change: str, constraint: str
) -> None:
    """
    Also from an operator at the prompt.
    """
    await tasks.submit(db, [new_task()])

    with pytest.raises(StatementRefused, match=constraint):
        await db.execute(f"UPDATE asyncflow.tasks SET {change}")


async def test_the_schema_knows_no_other_states(db: Database) -> None:
    """
    There is no partition for them.
    """
    await tasks.submit(db, [new_task()])

    with pytest.raises(StoreUnavailable, match="no partition"):
        await db.execute("UPDATE asyncflow.tasks SET state = 'lost'")
