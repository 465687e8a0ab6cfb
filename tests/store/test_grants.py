"""
`asyncflow grants` prints exactly the privileges that AsyncFlow's statements need, read-only where
only migrations write.
"""

from __future__ import annotations

from urllib.parse import urlsplit

import asyncpg
import pytest

from asyncflow.domain.states import State
from asyncflow.store import workers
from asyncflow.store.database import Database
from asyncflow.store.grants import grants_for
from asyncflow.store.inspection import inspect
from asyncflow.store.migrations import migrate
from tests.store.test_statements import STATEMENTS
from tests.support.builders import a_task, a_worker, row_of

PRIVILEGE = asyncpg.InsufficientPrivilegeError


@pytest.fixture
async def granted_url(empty_database_url: str, role_url: str) -> str:
    """
    The DSN of a migrated database for a role that was granted what the command prints.
    """
    await migrate(empty_database_url)
    await run(empty_database_url, grants_for(str(urlsplit(role_url).username)))
    return role_url


async def run(url: str, statements: str) -> None:
    """
    Run a script as an operator at a prompt would.
    """
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


async def refused(db: Database) -> set[str]:
    """
    The statements that the role lacks a privilege for; none of them is executed.
    """
    connection = await db.connect("test")
    found = set()
    for name, statement in STATEMENTS.items():
        count = len((await connection.prepare(statement)).get_parameters())
        arguments = f"({', '.join(['NULL'] * count)})" if count else ""
        await connection.execute(f"PREPARE one AS {statement}")
        try:
            await connection.execute(f"EXPLAIN EXECUTE one {arguments}")
        except PRIVILEGE:
            found.add(name)
        await connection.execute("DEALLOCATE one")
    connection.terminate()
    return found


async def test_every_statement_may_be_run(granted_url: str) -> None:
    """
    The granted role may run every statement of API, workers, maintenance and the command line.
    """
    async with Database(granted_url) as db:
        assert set() == await refused(db)
        findings = await inspect(db, timeout_seconds=10, connections=1)

        task = await a_task(db, state=State.COMPLETED, attempt=2)
        worker = await a_worker(db)
        await workers.stop(db, worker.id)

        assert [] == [finding for finding in findings if finding.is_wrong]
        assert "completed" == (await row_of(db, task.id))["state"]


async def test_the_check_notices_a_missing_right(empty_database_url: str, granted_url: str) -> None:
    """
    The startup check names a missing privilege and the command that helps; if it did not, the tests
    above would prove nothing.
    """
    role = urlsplit(granted_url).username
    await run(empty_database_url, f"REVOKE DELETE ON asyncflow.attempts FROM {role}")

    async with Database(granted_url) as db:
        missing = await refused(db)
        findings = await inspect(db, timeout_seconds=10, connections=1)
    (wrong,) = [finding for finding in findings if finding.is_wrong]

    assert "upkeep.PRUNE_FINISHED" in missing
    assert f"Role {role} lacks DELETE on attempts." == wrong.sentence
    assert f"`asyncflow grants {role}`" in wrong.remedy


async def test_tables_of_later_migrations_are_included(
    empty_database_url: str, granted_url: str
) -> None:
    """
    The grants cover tables of later migrations, so an upgrade needs no new ones.
    """
    await run(empty_database_url, "CREATE TABLE asyncflow.later (a int)")

    await run(granted_url, "INSERT INTO asyncflow.later VALUES (1)")


async def test_the_schema_version_is_only_read(granted_url: str) -> None:
    """
    The granted role can read the recorded schema version but not change it.
    """
    with pytest.raises(PRIVILEGE):
        await run(granted_url, "UPDATE asyncflow.schema_version SET version_num = '9999'")


def test_a_role_of_any_name_is_quoted() -> None:
    """
    Any role name is quoted as PostgreSQL requires.
    """
    assert 'TO "app-role";' in grants_for("app-role")
    assert 'TO "a""; DROP TABLE x; --";' in grants_for('a"; DROP TABLE x; --')
