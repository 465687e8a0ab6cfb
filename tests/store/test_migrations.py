"""
Migrations are safe to run concurrently, leave other applications' tables alone, and never go
backwards.
"""

from __future__ import annotations

import asyncio
import runpy
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from asyncflow.domain.states import State
from asyncflow.errors import (
    MigrationRefused,
    SchemaMismatch,
    ServerUnfit,
    StatementRefused,
    StoreUnavailable,
)
from asyncflow.store import migrations, schema, submit
from asyncflow.store.database import Database
from asyncflow.store.grants import grants_for
from asyncflow.store.inspection import inspect
from asyncflow.store.migrations import migrate
from asyncflow.store.schema import SCHEMA_VERSION, Schema, check_schema, read_schema
from asyncflow.store.workers import Published, list_workers, published_handlers
from tests.support.builders import a_task, new_task
from tests.support.postgres import PostgresServer

NEWER = "9999"
NEXT_VERSION = f"{int(SCHEMA_VERSION) + 1:04}"


async def has_schema(db: Database, version: str) -> None:
    """
    Make the database report a schema that is compatible only with its own version.
    """
    await db.execute(
        f"UPDATE asyncflow.schema_version"
        f"   SET version_num = '{version}', compatible_from = '{version}'"
    )


async def test_five_concurrent_runs_migrate_an_empty_database_once(empty_database_url: str) -> None:
    """
    When a deployment starts five processes, all of them return, and the schema is complete.
    """
    await asyncio.gather(*(migrate(empty_database_url) for _ in range(5)))

    async with Database(empty_database_url) as db:
        await check_schema(db)
        assert 1 == await db.fetchval("SELECT count(*) FROM asyncflow.tenants")
        await submit.submit(db, [new_task()])


async def test_migrating_again_changes_nothing_and_tells_the_version(
    empty_database_url: str,
) -> None:
    """
    The first call finds no schema, the second one finds this version's and changes nothing.
    """
    first = await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        await submit.submit(db, [new_task()])
        second = await migrate(empty_database_url)

        assert (None, SCHEMA_VERSION) == (first, second)
        assert 1 == await db.fetchval("SELECT count(*) FROM asyncflow.tasks")


async def test_a_database_may_belong_to_an_application_too(empty_database_url: str) -> None:
    """
    An application's tables, even with the same names, are unchanged; migrations touch only
    AsyncFlow's schema.
    """
    async with Database(empty_database_url) as db:
        for statement in (
            "CREATE TABLE tasks (mine int)",
            "CREATE TABLE alembic_version (version_num text)",
            "INSERT INTO alembic_version VALUES ('theirs')",
        ):
            await db.execute(statement)

        await migrate(empty_database_url)

        await submit.submit(db, [new_task()])
        assert 0 == await db.fetchval("SELECT count(*) FROM public.tasks")
        assert "theirs" == await db.fetchval("SELECT version_num FROM public.alembic_version")
        ours = await db.fetch(
            "SELECT DISTINCT schemaname FROM pg_tables"
            " WHERE schemaname NOT IN ('pg_catalog', 'information_schema', 'public')"
        )
        assert ["asyncflow"] == [row["schemaname"] for row in ours]


async def test_a_database_without_our_schema_says_how_to_get_it(empty_database_url: str) -> None:
    """
    A database without the schema is reported in one sentence with the command to run.
    """
    async with Database(empty_database_url) as db:
        assert await read_schema(db) is None

        with pytest.raises(SchemaMismatch) as mismatch:
            await check_schema(db)

    assert (
        "The database has no AsyncFlow schema; "
        "run `asyncflow migrate` with the version you are deploying."
    ) == str(mismatch.value)


@pytest.mark.parametrize("version", ["0000", NEWER])
async def test_another_version_of_the_schema_is_named(fresh_db: Database, version: str) -> None:
    """
    The error names both versions, whether the schema is older or newer.
    """
    await has_schema(fresh_db, version)

    with pytest.raises(SchemaMismatch) as mismatch:
        await check_schema(fresh_db)

    assert (version, SCHEMA_VERSION) == (mismatch.value.found, mismatch.value.needed)
    assert f"has schema {version}, this version needs {SCHEMA_VERSION}" in str(mismatch.value)


async def test_a_newer_schema_is_never_touched(fresh_db: Database, database_url: str) -> None:
    """
    An old release started by mistake does not migrate backwards.
    """
    await has_schema(fresh_db, NEWER)

    with pytest.raises(SchemaMismatch):
        await migrate(database_url)

    found = await read_schema(fresh_db)
    assert found is not None
    assert NEWER == found.version


async def test_a_database_that_is_down_is_unavailable() -> None:
    """
    A caller gets StoreUnavailable rather than a driver's error, and may wait and try again.
    """
    with pytest.raises(StoreUnavailable):
        await migrate("postgresql://nobody@127.0.0.1:1/nothing")


async def test_a_database_that_is_missing_is_unavailable(postgres_server: PostgresServer) -> None:
    """
    A missing database counts as unavailable, since it may just be being created.
    """
    url = postgres_server.cluster.url.replace("/postgres?", "/missing?")

    with pytest.raises(StoreUnavailable, match="missing"):
        await migrate(url)


# Roles with few privileges


def name_of(role_url: str) -> str:
    """
    The role of a DSN.
    """
    return str(urlsplit(role_url).username)


async def test_a_schema_that_was_made_for_the_role_is_enough(
    empty_database_url: str, role_url: str
) -> None:
    """
    A role that owns a schema prepared by an administrator can migrate without further privileges.
    """
    async with Database(empty_database_url) as db:
        await db.execute(f"CREATE SCHEMA asyncflow AUTHORIZATION {name_of(role_url)}")

    await migrate(role_url)

    async with Database(role_url) as db:
        await check_schema(db)
        await submit.submit(db, [new_task()])


async def test_a_role_that_may_only_use_the_schema_finds_nothing_to_do(
    empty_database_url: str, role_url: str
) -> None:
    """
    A pipeline may run `migrate` as the restricted role, or on a read-only server, if nothing is to
    be done.
    """
    await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        await granted(db, name_of(role_url))
        await db.execute(f"ALTER ROLE {name_of(role_url)} SET default_transaction_read_only = on")

    assert SCHEMA_VERSION == await migrate(role_url)


async def granted(db: Database, role: str) -> None:
    """
    Run what `asyncflow grants` prints.
    """
    connection = await db.connect("grants")
    await connection.execute(grants_for(role))
    await connection.close()


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        ([], 'let its owner run: CREATE SCHEMA asyncflow AUTHORIZATION "{role}".'),
        (
            ["CREATE SCHEMA asyncflow"],
            'let its owner run: GRANT USAGE, CREATE ON SCHEMA asyncflow TO "{role}".',
        ),
        (
            [
                "CREATE SCHEMA asyncflow",
                "CREATE TABLE asyncflow.schema_version (version_num text)",
            ],
            "let the owner run what `asyncflow grants {role}` prints.",
        ),
        (
            [
                "CREATE SCHEMA asyncflow AUTHORIZATION {role}",
                "CREATE TABLE asyncflow.schema_version (version_num text)",
                "GRANT SELECT ON asyncflow.schema_version TO {role}",
            ],
            "The tables of AsyncFlow belong to role postgres; migrate as that role",
        ),
        (
            [
                "CREATE SCHEMA asyncflow AUTHORIZATION {role}",
                "CREATE TABLE asyncflow.tasks (a int)",
            ],
            "holds tables that are not AsyncFlow's (tasks)",
        ),
        (
            ["ALTER ROLE {role} SET default_transaction_read_only = on"],
            "The server takes no writes",
        ),
    ],
)
async def test_what_keeps_a_role_from_migrating_is_a_sentence(
    empty_database_url: str, role_url: str, before: list[str], sentence: str
) -> None:
    """
    The error contains the statement that helps, if there is one, and nothing is changed.
    """
    role = name_of(role_url)
    async with Database(empty_database_url) as db:
        for statement in before:
            await db.execute(statement.format(role=role))

        with pytest.raises(MigrationRefused) as refusal:
            await migrate(role_url)

        assert await read_schema(db) is None
    assert sentence.format(role=role) in str(refusal.value)


async def test_what_postgresql_refuses_is_a_sentence(
    next_migration: NextMigration, empty_database_url: str
) -> None:
    """
    A refusal by PostgreSQL is reported in one sentence, and the schema is unchanged.
    """
    await migrate(empty_database_url)

    with next_migration("ALTER TABLE asyncflow.absent ADD COLUMN a int"):
        with pytest.raises(MigrationRefused, match=r"refused the migration: .*absent"):
            await migrate(empty_database_url)

    async with Database(empty_database_url) as db:
        assert SCHEMA_VERSION == (await check_schema(db)).version


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
async def test_a_database_that_cannot_hold_every_character_is_refused(
    postgres_server: PostgresServer, encoding: str
) -> None:
    """
    An unsuitable encoding is refused immediately, not when the first payload contains a €.
    """
    url = await asyncio.to_thread(postgres_server.create_empty_database, encoding=encoding)
    try:
        with pytest.raises(ServerUnfit, match=f"is {encoding}.*must be UTF8"):
            await migrate(url)
    finally:
        await asyncio.to_thread(postgres_server.drop_database, url)


# Waiting


async def test_another_migration_is_waited_for_with_a_word_about_it(
    empty_database_url: str,
) -> None:
    """
    A waiting migration logs which session it waits for, and runs once that has ended, even if the
    role has a short lock_timeout.
    """
    async with Database(empty_database_url) as db:
        name = await db.fetchval("SELECT current_database()")
        other = await db.connect("somebody")
        await other.execute(f"SELECT pg_advisory_lock({migrations.MIGRATION_LOCK})")
        pid = await other.fetchval("SELECT pg_backend_pid()")
        await db.execute(f"ALTER DATABASE {name} SET lock_timeout = '1ms'")
        said: list[str] = []

        def hear(line: str) -> None:
            said.append(line)
            other.terminate()

        await migrate(empty_database_url, say=hear)

        await check_schema(db)
    assert f"Waiting for another migration (pid {pid}, asyncflow somebody) …" == said[0]


async def test_waiting_for_another_migration_ends(empty_database_url: str) -> None:
    """
    Waiting is bounded; the error says which session is in the way and which option waits longer.
    """
    async with Database(empty_database_url) as db:
        other = await db.connect("somebody")
        await other.execute(f"SELECT pg_advisory_lock({migrations.MIGRATION_LOCK})")

        with pytest.raises(StoreUnavailable, match=r"another migration \(pid .*--lock-timeout"):
            await migrate(empty_database_url, lock_seconds=0)

        other.terminate()


async def test_a_session_that_holds_a_table_is_named_and_passed(
    next_migration: NextMigration, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A migration waits only briefly for a table's lock, since every other session would queue behind
    it; it logs which session holds the table and tries again.
    """
    monkeypatch.setattr(migrations, "BOUNDS", "SET LOCAL lock_timeout = '50ms'")
    await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        other = await db.connect("somebody")
        await other.execute("BEGIN; LOCK TABLE asyncflow.queues")
        said: list[str] = []

        def hear(line: str) -> None:
            said.append(line)
            other.terminate()

        with next_migration("ALTER TABLE asyncflow.queues ADD COLUMN note text"):
            await migrate(empty_database_url, say=hear)

        assert 0 == await db.fetchval("SELECT count(note) FROM asyncflow.queues")
    assert "a session that holds a table of AsyncFlow (pid " in said[0]
    assert "asyncflow somebody" in said[0]


# The previous version runs on the next schema


NextMigration = Callable[..., AbstractContextManager[None]]

NEXT_VERSION = f"{int(SCHEMA_VERSION) + 1:04}"

NEXT = """
from alembic import op

revision = "{version}"
down_revision = "{before}"
compatible_from = "{compatible_from}"


def upgrade():
    op.execute("{statement}")
"""


@pytest.fixture
def next_migration(tmp_path: Path) -> NextMigration:
    """
    Act as the next version of AsyncFlow during a block, with a migration of one statement.
    """

    @contextmanager
    def released(statement: str, *, compatible_from: str = SCHEMA_VERSION) -> Iterator[None]:
        folder = tmp_path / "migrations"
        shutil.copytree(migrations.FOLDER, folder, dirs_exist_ok=True)
        text = NEXT.format(
            version=NEXT_VERSION,
            before=SCHEMA_VERSION,
            statement=statement,
            compatible_from=compatible_from,
        )
        (folder / "versions" / f"{NEXT_VERSION}_next.py").write_text(text)
        with _release(folder, NEXT_VERSION):
            yield

    return released


@contextmanager
def _release(folder: Path, version: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(migrations, "FOLDER", folder)
        patch.setattr(migrations, "SCHEMA_VERSION", version)
        patch.setattr(schema, "SCHEMA_VERSION", version)
        yield


EXPAND = "ALTER TABLE asyncflow.tasks ADD COLUMN colour text"


async def test_this_version_runs_on_the_next_schema_that_serves_it(
    next_migration: NextMigration, empty_database_url: str
) -> None:
    """
    Running processes stay ready, starting ones are fit, and migrating again changes nothing.
    """
    await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        await submit.submit(db, [new_task()])
        with next_migration(EXPAND):
            assert SCHEMA_VERSION == await migrate(empty_database_url)

        assert Schema(NEXT_VERSION, SCHEMA_VERSION) == await check_schema(db)
        findings = await inspect(db, timeout_seconds=10, connections=1)
        assert [] == [finding for finding in findings if finding.is_wrong]
        await a_task(db, state=State.COMPLETED, attempt=2)
        assert NEXT_VERSION == await migrate(empty_database_url)


async def test_a_schema_that_no_longer_serves_this_version_is_refused(
    next_migration: NextMigration, empty_database_url: str
) -> None:
    """
    Processes and `migrate` refuse an incompatible schema, and do not suggest migrating.
    """
    await migrate(empty_database_url)
    with next_migration(EXPAND, compatible_from=NEXT_VERSION):
        await migrate(empty_database_url)

    async with Database(empty_database_url) as db:
        with pytest.raises(SchemaMismatch, match="deploy a newer version"):
            await check_schema(db)
    with pytest.raises(SchemaMismatch, match="deploy a newer version"):
        await migrate(empty_database_url)


async def test_a_database_from_before_versions_were_compatible_works_on(
    next_migration: NextMigration, empty_database_url: str
) -> None:
    """
    A schema without the compatibility column serves its own version, and the next migration adds
    the column.
    """
    await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        await db.execute("ALTER TABLE asyncflow.schema_version DROP COLUMN compatible_from")

        assert Schema(SCHEMA_VERSION, SCHEMA_VERSION) == await check_schema(db)
        with next_migration(EXPAND):
            await migrate(empty_database_url)
        assert Schema(NEXT_VERSION, SCHEMA_VERSION) == await check_schema(db)


def test_every_migration_says_whom_it_serves() -> None:
    """
    Every migration names the previous version as compatible, or itself if it breaks that one; see
    the rules in `migrations`.
    """
    files = sorted((migrations.FOLDER / "versions").glob("[0-9]*.py"))
    modules = [runpy.run_path(str(file)) for file in files]
    revisions = [module["revision"] for module in modules]

    assert SCHEMA_VERSION == revisions[-1]
    assert [file.name[:4] for file in files] == revisions
    for before, module in zip([None, *revisions], modules, strict=False):
        assert before == module["down_revision"]
        assert module["compatible_from"] in (before, module["revision"])


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
    Constraints refuse such rows even from an operator at a prompt.
    """
    await submit.submit(db, [new_task()])

    with pytest.raises(StatementRefused, match=constraint):
        await db.execute(f"UPDATE asyncflow.tasks SET {change}")


async def test_the_schema_knows_no_other_states(db: Database) -> None:
    """
    A row in an unknown state is refused, because no partition accepts it.
    """
    await submit.submit(db, [new_task()])

    with pytest.raises(StoreUnavailable, match="no partition"):
        await db.execute("UPDATE asyncflow.tasks SET state = 'lost'")


# Upgrades keep existing data


@pytest.fixture
def at_version(tmp_path: Path) -> Callable[[str], AbstractContextManager[None]]:
    """
    Act as an earlier version of AsyncFlow during a block: `migrate` stops at its schema.
    """

    @contextmanager
    def released(version: str) -> Iterator[None]:
        folder = tmp_path / "earlier"
        shutil.copytree(migrations.FOLDER, folder, dirs_exist_ok=True)
        for file in (folder / "versions").glob("[0-9]*.py"):
            if file.name[:4] > version:
                file.unlink()
        with _release(folder, version):
            yield

    return released


async def test_what_workers_published_before_0002_is_known_after_it(
    at_version: Callable[[str], AbstractContextManager[None]], empty_database_url: str
) -> None:
    """
    After the migration the API still chooses queues and checks payloads before the first new worker
    starts.
    """
    with at_version("0001"):
        await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        await db.execute("INSERT INTO asyncflow.handlers VALUES ('mail', 'post', '{}', now())")

        assert "0001" == await migrate(empty_database_url)

        assert [Published("mail", "post", {})] == await published_handlers(db)


async def test_the_slots_of_workers_survive_0004(
    at_version: Callable[[str], AbstractContextManager[None]], empty_database_url: str
) -> None:
    """
    The renamed column `concurrency` keeps its values, and the version that used the old name is
    refused.
    """
    with at_version("0003"):
        await migrate(empty_database_url)
    async with Database(empty_database_url) as db:
        await db.execute(
            "INSERT INTO asyncflow.workers"
            " (id, name, queues, handlers, concurrency, heartbeat_seconds, lease_seconds)"
            " VALUES (gen_random_uuid(), 'host:1', '{default}', '{}', 7, 1, 15)"
        )

        assert "0003" == await migrate(empty_database_url)

        assert [7] == [worker.slots for worker in await list_workers(db)]
        with at_version("0003"), pytest.raises(SchemaMismatch, match="deploy a newer version"):
            await check_schema(db)
