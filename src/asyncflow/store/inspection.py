"""
Whether this PostgreSQL is fit for AsyncFlow: one finding per check, for every starting process and
for `asyncflow doctor`.

Everything is read in one statement from the catalogs, which any role may read, and judged by
pure functions. Time zones and date styles have no check: values travel in binary, and nothing
depends on them.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import asyncpg

from asyncflow.errors import StoreUnavailable
from asyncflow.findings import Finding, doubtful, fine, wrong
from asyncflow.store.database import PLANNER, Database, Executor, translated_errors
from asyncflow.store.schema import Schema, mismatch, read_schema

VERSION_MIN = 150_000
CLOCK_SECONDS_MAX = 5.0
IDLE_SESSION_MS_MIN = 10_000
"""An idle listener tests its connection every five seconds."""

POOLER_TRIES = 5
DATABASE_URL = "ASYNCFLOW_DATABASE_URL"
POOLER = "ASYNCFLOW_DATABASE_POOLER"


def about_server(more: str) -> str:
    """
    The statement that reads what every check of a server needs, and `more` columns.

    In `more`, `n` is the schema of AsyncFlow in `pg_namespace`; all NULL if there is none.
    """
    return f"""
    SELECT current_database() AS database,
           current_user AS role,
           current_setting('server_version') AS version,
           current_setting('server_version_num')::int AS version_number,
           current_setting('server_encoding') AS encoding,
           current_setting('transaction_read_only') AS read_only,
           pg_is_in_recovery() AS is_standby,
           n.oid IS NOT NULL AS has_namespace,
           coalesce(has_schema_privilege(n.oid, 'USAGE'), false) AS may_use_namespace,
           {more}
      FROM (SELECT) one
      LEFT JOIN pg_namespace n ON n.nspname = 'asyncflow'
"""


FACTS = about_server("""
           current_setting('fsync') AS fsync,
           current_setting('synchronous_commit') AS synchronous_commit,
           current_setting('default_transaction_isolation') AS isolation,
           current_setting('search_path') AS search_path,
           current_setting('enable_seqscan') AS sequential_scans,
           current_setting('max_connections')::int
               - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0) AS connections_max,
           -- pg_stat_activity hides other roles' sessions from most roles.
           (SELECT sum(numbackends)::int
              FROM pg_stat_database) AS connections,
           (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_connections_max,
           (SELECT count(*)::int
              FROM pg_stat_activity
             WHERE usename = current_user
               AND backend_type = 'client backend') AS role_connections,
           (SELECT setting::int
              FROM pg_settings
             WHERE name = 'statement_timeout') AS statement_timeout_ms,
           (SELECT setting::int
              FROM pg_settings
             WHERE name = 'idle_session_timeout') AS idle_session_timeout_ms,
           pg_backend_pid() AS pid,
           extract(epoch FROM clock_timestamp())::float8 AS clock,
           ARRAY (SELECT r.name || ' on ' || c.relname
                    FROM pg_class c
                   CROSS JOIN unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) r(name)
                   WHERE c.relnamespace = n.oid
                     AND c.relkind IN ('r', 'p')
                     -- Only `migrate` writes these.
                     AND (r.name = 'SELECT' OR c.relname NOT IN ('schema_version', 'tenants'))
                     AND NOT has_table_privilege(c.oid, r.name)
                   ORDER BY c.relname, r.name) AS missing_rights
""")

BACKEND = """
    SELECT pg_backend_pid()
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """
    What PostgreSQL reports, and what we measured.

    Attributes:
        has_pooler: A pooler between us and PostgreSQL has sessions of its own.
        shares_sessions: It gives a session to other clients between our transactions.
        clock_ahead_seconds: How far PostgreSQL's clock is ahead of ours, less what the round trip
            leaves uncertain.
        schema: None if there is none, or if it may not be read.
    """

    database: str
    role: str
    version: str
    version_number: int
    encoding: str
    fsync: str
    synchronous_commit: str
    read_only: str
    isolation: str
    search_path: str
    sequential_scans: str
    connections_max: int
    connections: int
    role_connections_max: int
    role_connections: int
    statement_timeout_ms: int
    idle_session_timeout_ms: int
    is_standby: bool
    has_namespace: bool
    may_use_namespace: bool
    missing_rights: tuple[str, ...]
    has_pooler: bool
    shares_sessions: bool
    clock_ahead_seconds: float
    schema: Schema | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """
    What our settings claim and need.

    Attributes:
        pooler: Whether the URL is said to lead to PgBouncer in transaction mode.
        timeout_seconds: Of a statement.
        connections: How many a process needs at most.
    """

    pooler: bool
    timeout_seconds: float
    connections: int


async def inspect(db: Database, *, timeout_seconds: float, connections: int) -> list[Finding]:
    """
    Examine the database behind `db`; changes nothing.

    A database that cannot be reached is a finding too.

    Args:
        timeout_seconds: Our time limit for a statement.
        connections: How many a process of ours needs at most.
    """
    expected = Expected(pooler=db.pooler, timeout_seconds=timeout_seconds, connections=connections)
    try:
        with translated_errors():
            facts = await _facts(db)
    except (StoreUnavailable, asyncpg.InsufficientPrivilegeError) as error:
        return [unreachable(error)]
    return list(judged(facts, expected))


async def _facts(db: Database) -> Facts:
    connection = await db.connect("inspection")
    try:
        asked_at, asked = time.time(), time.monotonic()
        row = await connection.fetchrow(FACTS)
        assert row is not None
        took = time.monotonic() - asked
        values = dict(row)
        pid, clock = values.pop("pid"), values.pop("clock")
        has_pooler = pid != connection.get_server_pid()
        may_read = (
            values["may_use_namespace"] and "SELECT on schema_version" not in row["missing_rights"]
        )
        return Facts(
            **{**values, "missing_rights": tuple(values["missing_rights"])},
            has_pooler=has_pooler,
            shares_sessions=has_pooler and await _shares_sessions(db, connection),
            clock_ahead_seconds=_beyond(clock - asked_at - took / 2, took / 2),
            schema=await read_schema(connection) if may_read else None,
        )
    finally:
        connection.terminate()


async def _shares_sessions(db: Database, first: Executor) -> bool:
    # While `first` is connected, a second client can only get its session if the pooler takes
    # it away between transactions. It prefers the one that was used last.
    second = await db.connect("inspection")
    try:
        for _ in range(POOLER_TRIES):
            if await first.fetchval(BACKEND) == await second.fetchval(BACKEND):
                return True
        return False
    finally:
        second.terminate()


def _beyond(difference: float, uncertainty: float) -> float:
    certain = max(0.0, abs(difference) - uncertainty)
    return certain if difference > 0 else -certain


# Judging


def judged(facts: Facts, expected: Expected) -> Iterator[Finding]:
    """
    One finding per check.
    """
    yield fine("PostgreSQL connection", f"Database {facts.database} answers as {facts.role}.")
    yield version(facts.version, facts.version_number)
    yield encoding(facts.database, facts.encoding)
    yield _writes(facts)
    yield _schema(facts)
    yield _rights(facts)
    yield _pooler(facts, expected)
    yield _isolation(facts)
    yield _durability(facts)
    yield _timeouts(facts, expected)
    yield _connections(facts, expected)
    yield _search_path(facts)
    yield _clock(facts)


def version(name: str, number: int) -> Finding:
    """
    Whether the server is new enough; `number` is its `server_version_num`.
    """
    what = "PostgreSQL version"
    sentence = f"The server is PostgreSQL {name}."
    if number < VERSION_MIN:
        return wrong(what, sentence, "AsyncFlow needs PostgreSQL 15 or newer.")
    return fine(what, sentence)


def encoding(database: str, name: str) -> Finding:
    """
    Whether the database can hold every character.
    """
    what = "PostgreSQL encoding"
    sentence = f"The encoding of database {database} is {name}."
    if name != "UTF8":
        return wrong(
            what,
            sentence,
            "Payloads may hold any character, so it must be UTF8: create another database with "
            "CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0.",
        )
    return fine(what, sentence)


def _writes(facts: Facts) -> Finding:
    what = "PostgreSQL writes"
    if facts.is_standby:
        return wrong(
            what,
            "The server is a standby, which takes no writes.",
            f"Point {DATABASE_URL} at the primary, or name all hosts in it and add "
            "target_session_attrs=read-write.",
            may_pass=True,
        )
    if facts.read_only == "on":
        return wrong(
            what,
            "The server takes no writes: default_transaction_read_only is on.",
            f"Set it to off for the server, database {facts.database} and role {facts.role}.",
            may_pass=True,
        )
    return fine(what, "The server takes writes.")


def _schema(facts: Facts) -> Finding:
    what = "PostgreSQL schema"
    if facts.schema is None and facts.has_namespace and _lacks_rights_to_see(facts):
        return doubtful(
            what, "The schema's version cannot be read.", "Grant the missing rights first."
        )
    if facts.schema is None or not facts.schema.serves_us:
        # Its sentence holds fact and remedy.
        fact, _, remedy = str(mismatch(facts.schema)).partition("; ")
        return wrong(what, f"{fact}.", f"{remedy[0].upper()}{remedy[1:]}")
    return fine(what, f"The schema's version is {facts.schema.version}.")


def _lacks_rights_to_see(facts: Facts) -> bool:
    return not facts.may_use_namespace or "SELECT on schema_version" in facts.missing_rights


def _rights(facts: Facts) -> Finding:
    what = "PostgreSQL rights"
    remedy = f"As the role that migrates, run what `asyncflow grants {facts.role}` prints."
    if not facts.has_namespace:
        return fine(what, "There is nothing to have rights on yet.")
    if not facts.may_use_namespace:
        return wrong(
            what,
            f"Role {facts.role} lacks USAGE on schema asyncflow.",
            remedy,
            may_pass=True,
        )
    if facts.missing_rights:
        shown = ", ".join(facts.missing_rights[:3])
        more = len(facts.missing_rights) - 3
        rest = f" and {more} more rights" if more > 0 else ""
        return wrong(what, f"Role {facts.role} lacks {shown}{rest}.", remedy, may_pass=True)
    return fine(what, f"Role {facts.role} may read and write every table.")


def _pooler(facts: Facts, expected: Expected) -> Finding:
    what = "PostgreSQL pooler"
    if expected.pooler and not facts.has_pooler:
        return doubtful(
            what,
            f"{POOLER} is true, but the connection leads straight to PostgreSQL.",
            "Set it to false: wake-ups and session locks then make idle systems quicker.",
        )
    if facts.shares_sessions and not expected.pooler:
        return wrong(
            what,
            "A pooler shares PostgreSQL sessions between transactions, and AsyncFlow does not "
            "know.",
            f"Set {POOLER}=true.",
        )
    if facts.has_pooler and facts.sequential_scans == "on":
        names = ", ".join(PLANNER)
        return doubtful(
            what,
            "The planner's settings of AsyncFlow do not reach PostgreSQL through the pooler.",
            f"Give them to role {facts.role} with ALTER ROLE … SET: {names} "
            "(docs/operations.md has the statements).",
        )
    return fine(what, "A pooler serves us." if facts.has_pooler else "There is none.")


def _isolation(facts: Facts) -> Finding:
    what = "PostgreSQL isolation"
    if facts.isolation != "read committed":
        return wrong(
            what,
            f"default_transaction_isolation is {facts.isolation}, under which workers that claim "
            "side by side fail.",
            f"ALTER ROLE {facts.role} SET default_transaction_isolation = 'read committed'.",
        )
    return fine(what, "default_transaction_isolation is read committed.")


def _durability(facts: Facts) -> Finding:
    what = "PostgreSQL durability"
    off = [name for name in ("fsync", "synchronous_commit") if getattr(facts, name) == "off"]
    if off:
        return doubtful(
            what,
            f"{' and '.join(off)} {'is' if len(off) == 1 else 'are'} off: a crash of the server "
            "loses tasks that were answered with 202.",
            "Turn it on, unless these tasks may be lost.",
        )
    return fine(what, "Commits are on disk before they are answered.")


def _timeouts(facts: Facts, expected: Expected) -> Finding:
    what = "PostgreSQL timeouts"
    if 0 < facts.statement_timeout_ms < 1000 * expected.timeout_seconds:
        return doubtful(
            what,
            f"statement_timeout is {facts.statement_timeout_ms} ms, less than "
            f"ASYNCFLOW_DATABASE_TIMEOUT_SECONDS={expected.timeout_seconds:g}.",
            f"ALTER ROLE {facts.role} SET statement_timeout = 0; AsyncFlow bounds its statements.",
        )
    if 0 < facts.idle_session_timeout_ms < IDLE_SESSION_MS_MIN:
        return doubtful(
            what,
            f"idle_session_timeout is {facts.idle_session_timeout_ms} ms, so that idle workers "
            "lose their connections again and again.",
            f"ALTER ROLE {facts.role} SET idle_session_timeout = 0.",
        )
    return fine(what, "No timeout of the server is shorter than ours.")


def _connections(facts: Facts, expected: Expected) -> Finding:
    what = "PostgreSQL connections"
    free = facts.connections_max - facts.connections
    limit = "max_connections"
    if 0 <= facts.role_connections_max:
        of_role = facts.role_connections_max - facts.role_connections
        if of_role < free:
            free, limit = of_role, f"the connection limit of role {facts.role}"
    if free < expected.connections and not facts.has_pooler:
        return doubtful(
            what,
            f"{max(0, free)} connections are free, and one process takes up to "
            f"{expected.connections}.",
            f"Raise {limit}, or lower ASYNCFLOW_DATABASE_POOL_SIZE.",
        )
    return fine(what, f"{facts.connections} of {facts.connections_max} connections are taken.")


def _search_path(facts: Facts) -> Finding:
    what = "PostgreSQL search_path"
    folders = [folder.strip().strip('"') for folder in facts.search_path.split(",")]
    if "pg_catalog" in folders[1:]:
        return doubtful(
            what,
            "search_path puts other schemas before pg_catalog, so that their functions can take "
            "the place of PostgreSQL's.",
            f"ALTER ROLE {facts.role} SET search_path = public.",
        )
    return fine(what, "PostgreSQL's own functions come first.")


def _clock(facts: Facts) -> Finding:
    what = "PostgreSQL clock"
    seconds = facts.clock_ahead_seconds
    if abs(seconds) > CLOCK_SECONDS_MAX:
        direction = "ahead of" if seconds > 0 else "behind"
        return doubtful(
            what,
            f"PostgreSQL's clock is {abs(seconds):.0f} seconds {direction} this machine's.",
            "Synchronise both: tasks run by PostgreSQL's clock, and clients reckon with theirs.",
        )
    return fine(what, "PostgreSQL's clock and this machine's agree.")


# What cannot even be looked at


def unreachable(error: BaseException) -> Finding:
    """
    Why PostgreSQL does not let us in, and what to do about it.
    """
    what = "PostgreSQL connection"
    cause = error.__cause__ if isinstance(error, StoreUnavailable) else error
    if isinstance(cause, asyncpg.InvalidCatalogNameError):
        name = _quoted_name(cause)
        named = f"no database {name}" if name else "not the database that the URL names"
        return wrong(
            what,
            f"The server has {named}.",
            f"Create it with CREATE DATABASE {name or '…'} ENCODING 'UTF8' TEMPLATE template0, "
            f"or correct {DATABASE_URL}.",
            may_pass=True,
        )
    if isinstance(cause, asyncpg.InvalidAuthorizationSpecificationError):
        return wrong(
            what,
            f"The server refuses the login: {cause}.",
            f"Correct user and password in {DATABASE_URL}, or the server's pg_hba.conf.",
            may_pass=True,
        )
    if isinstance(cause, asyncpg.InsufficientPrivilegeError):
        return wrong(
            what,
            f"The server refuses the login: {cause}.",
            "Grant the role CONNECT on the database.",
            may_pass=True,
        )
    if isinstance(cause, ssl.SSLError) or "SSL" in str(cause):
        return wrong(
            what,
            f"There is no TLS connection: {str(cause).rstrip('.')}.",
            f"Correct sslmode and sslrootcert in {DATABASE_URL}, or the server's certificate.",
            may_pass=True,
        )
    if isinstance(cause, asyncpg.ClientConfigurationError):
        return wrong(
            what,
            f"asyncpg refuses the settings of the connection: {str(cause).rstrip('.')}.",
            f"Correct {DATABASE_URL}, or the variables of libpq (PGSSLMODE and the like).",
        )
    if "unsupported startup parameter" in str(cause):
        return wrong(
            what,
            f"PgBouncer refuses the settings of our connections ({cause}).",
            f"Set {POOLER}=true if it pools transactions; if it pools sessions, add "
            f"{', '.join(PLANNER)} to its ignore_startup_parameters.",
        )
    return wrong(
        what,
        str(error) if str(error).endswith(".") else f"{error}.",
        f"Check that the server runs and that {DATABASE_URL} leads to it.",
        may_pass=True,
    )


def _quoted_name(error: BaseException) -> str | None:
    # Servers say it in their own language, with the name in its quotes.
    found = re.search(r'["«»„“](.+?)["«»“”]', str(error))
    return found[1] if found else None
