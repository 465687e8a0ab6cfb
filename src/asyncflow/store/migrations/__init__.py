"""
Brings a database to the schema of this version, by Alembic.

One file per version under `versions/`, plain SQL. Safe to run concurrently: an advisory lock lets
one migration work, and the others find nothing left to do.

**For authors of migrations.** Operators migrate first and replace their processes afterwards,
so version N of the code runs on schema N + 1 for a while: expand, deploy, contract.

- A migration may add tables, columns that are nullable or have a default, and indexes. It does
  not rename or remove what the version before reads or writes, nor tighten a constraint that
  this version may break. What has become useless is removed one version later.
- Each file states `compatible_from`: the oldest schema version whose code runs on the new
  schema, as a rule the one before. `migrate` writes it into the database, where running
  processes and starting ones find it. A file that breaks its predecessor names itself; then all
  processes must be stopped for the migration, and the changes say so.
- It takes locks only for moments: no rewriting of a table, no index on a large one without
  CONCURRENTLY in a step of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from asyncflow.errors import MigrationRefused, StoreUnavailable
from asyncflow.findings import refuse_unfit
from asyncflow.store.database import Executor, Record, translated_errors
from asyncflow.store.dsn import connection_arguments
from asyncflow.store.inspection import about_server, encoding, unreachable, version
from asyncflow.store.schema import SCHEMA_VERSION, mismatch, read_schema

FOLDER = Path(__file__).parent
NAME = "asyncflow migrate"
MIGRATION_LOCK = 0x4153_594E_4346_4C57
"""Advisory lock key: the letters ASYNCFLW."""

LOCK_SECONDS = 300.0
TABLE_LOCK_SECONDS = 5.0
"""While a migration waits for a table, every other session waits behind it. So it soon lets them
pass and tries again."""

RETRY_SECONDS = 0.25
REPORT_SECONDS = 5.0

Say = Callable[[str], object]


async def migrate(
    url: str, *, lock_seconds: float = LOCK_SECONDS, say: Say = lambda line: None
) -> str | None:
    """
    Bring the database to this version's schema; return the version it had before.

    All or nothing: a migration that fails leaves the schema as it was. Nothing is written to a
    database that has this version's schema, or a newer one that serves this version.

    Args:
        lock_seconds: How long to wait for another migration, or for sessions that hold tables.
        say: Receives a line about what it is waiting for.

    Raises:
        MigrationRefused: A right is missing, or the schema belongs to another application.
        SchemaMismatch: The database's schema is newer, and does not serve this version.
        ServerUnfit: The server is too old, or the database cannot hold every character.
        StoreUnavailable: PostgreSQL cannot be reached, or the wait was too long.
    """
    arguments = connection_arguments(url)
    before = await _examine(arguments)
    if before is not None and before >= SCHEMA_VERSION:
        return before

    async def connect() -> asyncpg.Connection[Record]:
        return await _connect(arguments)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    patience = _Patience(lock_seconds, say)
    try:
        with translated_errors(), _refusals():
            async with engine.connect() as connection:
                while (obstacle := await _try_to_upgrade(connection)) is not None:
                    await patience.wait(obstacle)
    finally:
        await engine.dispose()
    return before


async def _connect(arguments: dict[str, Any]) -> asyncpg.Connection[Record]:
    return await asyncpg.connect(
        **arguments,
        timeout=10,
        statement_cache_size=0,
        server_settings={"application_name": NAME},
    )


# What may prevent it


RIGHTS = about_server("""
           has_database_privilege(current_database(), 'CREATE') AS may_create_namespace,
           coalesce(has_schema_privilege(n.oid, 'CREATE'), false) AS may_create,
           ARRAY (SELECT c.relname::text
                    FROM pg_class c
                   WHERE c.relnamespace = n.oid
                     AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
                   ORDER BY 1) AS tables,
           (SELECT has_table_privilege(c.oid, 'SELECT')
              FROM pg_class c
             WHERE c.relnamespace = n.oid
               AND c.relname = 'schema_version') AS may_read,
           (SELECT min(pg_get_userbyid(c.relowner))
              FROM pg_class c
             WHERE c.relnamespace = n.oid
               AND c.relkind IN ('r', 'p')
               AND NOT pg_has_role(c.relowner, 'USAGE')) AS other_owner
""")


async def _examine(arguments: dict[str, Any]) -> str | None:
    """
    The version of the schema, None if there is none; raises whatever prevents a migration.
    """
    try:
        with translated_errors():
            connection = await _connect(arguments)
    except (StoreUnavailable, asyncpg.InsufficientPrivilegeError) as error:
        raise StoreUnavailable(str(unreachable(error))) from error
    try:
        with translated_errors():
            facts = await connection.fetchrow(RIGHTS)
            assert facts is not None
            before = await _version(connection, facts)
    finally:
        connection.terminate()
    if before is None or before < SCHEMA_VERSION:
        _refuse_unless_possible(facts)
    return before


async def _version(connection: Executor, facts: Record) -> str | None:
    if facts["may_read"] is None:
        return None
    if not (facts["may_read"] and facts["may_use_namespace"]):
        raise MigrationRefused(
            f"Role {facts['role']} may not read the schema's version; migrate as the owner, or "
            f"let the owner run what `asyncflow grants {facts['role']}` prints."
        )
    found = await read_schema(connection)
    if found is not None and found.version > SCHEMA_VERSION and not found.serves_us:
        raise mismatch(found)
    return found.version if found else None


def _refuse_unless_possible(facts: Record) -> None:
    database, role = facts["database"], facts["role"]
    refuse_unfit(
        [version(facts["version"], facts["version_number"]), encoding(database, facts["encoding"])]
    )
    if facts["is_standby"] or facts["read_only"] == "on":
        raise MigrationRefused(
            "The server takes no writes: it is a standby, or default_transaction_read_only is on; "
            "migrate on the primary."
        )
    if facts["tables"] and facts["may_read"] is None:
        shown = ", ".join(facts["tables"][:3])
        raise MigrationRefused(
            f"The schema asyncflow of database {database} holds tables that are not AsyncFlow's "
            f"({shown}); rename it, or give AsyncFlow another database."
        )
    if not facts["has_namespace"] and not facts["may_create_namespace"]:
        raise MigrationRefused(
            f"Role {role} may not create the schema asyncflow in database {database}; let its "
            f'owner run: CREATE SCHEMA asyncflow AUTHORIZATION "{role}".'
        )
    if facts["has_namespace"] and not (facts["may_use_namespace"] and facts["may_create"]):
        raise MigrationRefused(
            f"Role {role} may not create tables in the schema asyncflow of database {database}; "
            f'let its owner run: GRANT USAGE, CREATE ON SCHEMA asyncflow TO "{role}".'
        )
    if facts["other_owner"] is not None:
        raise MigrationRefused(
            f"The tables of AsyncFlow belong to role {facts['other_owner']}; migrate as that role, "
            f"not as {role}."
        )


# One try


TRY_LOCK = f"""
    SELECT pg_try_advisory_xact_lock({MIGRATION_LOCK})
"""

BOUNDS = f"""
    SELECT set_config('lock_timeout', '{TABLE_LOCK_SECONDS:g}s', true),
           set_config('statement_timeout', '0', true),
           set_config('idle_in_transaction_session_timeout', '0', true)
"""

MIGRATING = f"""
    SELECT a.pid, coalesce(a.application_name, '') AS application
      FROM pg_locks l
      JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE l.locktype = 'advisory'
       AND l.granted
       AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
       AND (l.classid::bigint << 32 | l.objid::bigint) = {MIGRATION_LOCK}
"""

HOLDING = """
    SELECT a.pid, coalesce(a.application_name, '') AS application
      FROM pg_locks l
      JOIN pg_class c ON c.oid = l.relation
      JOIN pg_namespace n ON n.oid = c.relnamespace
      JOIN pg_stat_activity a ON a.pid = l.pid
     WHERE l.granted
       AND n.nspname = 'asyncflow'
       AND a.pid <> pg_backend_pid()
     ORDER BY a.xact_start
     LIMIT 1
"""


async def _try_to_upgrade(connection: AsyncConnection) -> str | None:
    """
    Upgrade unless another session is in the way; return which one is.
    """
    try:
        async with connection.begin():
            if (await connection.exec_driver_sql(TRY_LOCK)).scalar():
                await connection.exec_driver_sql(BOUNDS)
                await connection.run_sync(_upgrade)
                return None
            return f"another migration{await _who(connection, MIGRATING)}"
    except DBAPIError as error:
        if not isinstance(_cause(error), asyncpg.LockNotAvailableError):
            raise
    async with connection.begin():
        return f"a session that holds a table of AsyncFlow{await _who(connection, HOLDING)}"


async def _who(connection: AsyncConnection, query: str) -> str:
    session = (await connection.exec_driver_sql(query)).mappings().first()
    if session is None:
        return ""
    application = f", {session['application']}" if session["application"] else ""
    return f" (pid {session['pid']}{application})"


def _upgrade(connection: Connection) -> None:
    found = connection.exec_driver_sql("SELECT 1 FROM pg_namespace WHERE nspname = 'asyncflow'")
    if found.first() is None:
        connection.exec_driver_sql("CREATE SCHEMA asyncflow")
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
    _state_compatibility(connection, ScriptDirectory.from_config(config))


def _state_compatibility(connection: Connection, scripts: ScriptDirectory) -> None:
    newest = scripts.get_revision("head").module
    connection.exec_driver_sql(
        "ALTER TABLE asyncflow.schema_version ADD COLUMN IF NOT EXISTS compatible_from text"
    )
    connection.exec_driver_sql(
        f"UPDATE asyncflow.schema_version SET compatible_from = '{newest.compatible_from}'"
    )


class _Patience:
    """
    Waits for other sessions, reports that from time to time, and stops at a deadline.
    """

    def __init__(self, seconds: float, say: Say) -> None:
        self._seconds = seconds
        self._say = say
        self._began: float | None = None
        self._said: float | None = None

    async def wait(self, obstacle: str) -> None:
        """
        Wait for a moment.

        Raises:
            StoreUnavailable: The time is used up.
        """
        now = time.monotonic()
        self._began = self._began or now
        if now - self._began >= self._seconds:
            raise StoreUnavailable(
                f"The migration waited {self._seconds:g} seconds for {obstacle}; run it again "
                "later, or let it wait longer with --lock-timeout."
            )
        if self._said is None or now - self._said >= REPORT_SECONDS:
            self._said = now
            self._say(f"Waiting for {obstacle} …")
        await asyncio.sleep(RETRY_SECONDS)


# Errors


@contextmanager
def _refusals() -> Iterator[None]:
    """
    Raise PostgreSQL's own error, without SQLAlchemy's wrapping, as one sentence.
    """
    try:
        yield
    except DBAPIError as error:
        cause = _cause(error)
        if isinstance(cause, asyncpg.PostgresError) and not isinstance(cause, PASSING):
            raise MigrationRefused(f"PostgreSQL refused the migration: {cause}.") from error
        raise cause or error from None


PASSING = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
)
"""Down, stopping or full: the same migration may work later."""


def _cause(error: DBAPIError) -> BaseException | None:
    return error.orig.__cause__ if error.orig is not None else None
