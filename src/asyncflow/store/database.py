"""
One bounded connection pool per process, with honest errors.

`Database` runs single statements and short transactions. It retries what PostgreSQL rolled
back for us (deadlocks, serialization failures) and turns every "cannot serve now" into
`StoreUnavailable`, so that callers handle one name. It does not repeat a statement whose
outcome is unknown: that is the caller's decision.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import asyncpg

from asyncflow.errors import InvalidSettings, StatementRefused, StoreUnavailable
from asyncflow.forking import withhold

ROLLED_BACK = (
    asyncpg.DeadlockDetectedError,
    asyncpg.SerializationError,
    asyncpg.LockNotAvailableError,
)
"""PostgreSQL undid the statement; running it again is safe whatever it does."""

CANNOT_SERVE = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the server's farewell is still being read
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    OSError,
    TimeoutError,
)
"""Down, starting, stopping, full, out of connections, read-only or refusing us."""

REFUSED = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
"""The values are at fault; asyncpg's messages quote them."""

TRIES_MAX = 5
ACQUIRE_SECONDS_MAX = 3.0
"""A request that has waited this long for a connection is better told to come back."""

PLANNER = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_bitmapscan": "off",
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}
"""Every statement of ours has an index made for it, and the tables swing between empty and
millions of rows faster than their statistics. A plan made while a table was empty would
otherwise scan it for ever (measured: claims at 2 % of their rate).

For the same reason a statement about given tasks says ``t.id = ANY (…)`` instead of joining
them: a join may be planned to read every running task and look for the few that are meant.
And without bitmap scans, which read in the heap's order, such a statement meets its rows in id
order, which is the order of locks."""

Record = asyncpg.Record


class Executor(Protocol):
    """
    What store functions need: a pool, a transaction's connection, or a `Database`.
    """

    async def fetch(self, query: str, *args: Any) -> list[Record]: ...

    async def fetchrow(self, query: str, *args: Any) -> Record | None: ...

    async def fetchval(self, query: str, *args: Any) -> Any: ...

    async def execute(self, query: str, *args: Any) -> str: ...


class Database:
    """
    The process's one way to PostgreSQL.

    Opening does not connect; the first statement does, so that processes may start
    before their database.

    Args:
        url: A `postgresql://` DSN of the primary.
        size: Most connections at once.
        timeout_seconds: Bound on waiting for a connection, and again on each statement.
        pooler: True when the DSN leads to PgBouncer in transaction mode: no prepared
            statements, no session settings.
        name: Shown in `pg_stat_activity`.
    """

    def __init__(
        self,
        url: str,
        *,
        size: int = 8,
        timeout_seconds: float = 10.0,
        pooler: bool = False,
        name: str = "asyncflow",
    ) -> None:
        check_url(url)
        self.pooler = pooler
        self._url = url
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._pool = asyncpg.create_pool(
            url,
            min_size=0,
            max_size=size,
            timeout=timeout_seconds,
            command_timeout=timeout_seconds,
            max_inactive_connection_lifetime=300,
            # Our statements leave no session state; the default reset costs a round trip.
            reset=_nothing_to_reset,
            init=_withhold_from_forks,
            **self._session(name),
        )
        self._opened = False

    async def __aenter__(self) -> Database:
        await self._pool
        self._opened = True
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """
        Close every connection, at the latest after the statement timeout.
        """
        if not self._opened:
            return
        self._opened = False
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def fetch(self, query: str, *args: Any) -> list[Record]:
        """
        Run one statement and return its rows.

        Raises:
            StoreUnavailable: PostgreSQL cannot serve now, or the connection was lost
                while the statement ran; then its outcome is unknown.
            StatementRefused: The values can never be stored.
        """
        for tries_left in reversed(range(TRIES_MAX)):
            try:
                async with self._connection() as connection:
                    return list(await connection.fetch(query, *args))
            except ROLLED_BACK as error:
                if not tries_left:
                    raise StoreUnavailable(f"PostgreSQL kept refusing: {error}") from error
                await asyncio.sleep(random.uniform(0.005, 0.1))
        raise AssertionError("unreachable")

    async def fetchrow(self, query: str, *args: Any) -> Record | None:
        """
        Run one statement and return its first row, or None. See `fetch`.
        """
        rows = await self.fetch(query, *args)
        return rows[0] if rows else None

    async def fetchval(self, query: str, *args: Any) -> Any:
        """
        Run one statement and return its first row's first value, or None. See `fetch`.
        """
        rows = await self.fetch(query, *args)
        return rows[0][0] if rows else None

    async def execute(self, query: str, *args: Any) -> str:
        """
        Run one statement for its effect. See `fetch`.
        """
        await self.fetch(query, *args)
        return ""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Executor]:
        """
        A transaction on one connection; committed at the end, rolled back on an error.

        Keep it short, and never wait for anything but PostgreSQL inside.
        """
        async with self._connection() as connection, connection.transaction():
            yield connection

    async def connect(
        self, purpose: str, *, timeout_seconds: float | None = None
    ) -> asyncpg.Connection[Record]:
        """
        One connection outside the pool, for LISTEN, heartbeats and session locks.

        The caller terminates it. Also for a thread with an event loop of its own.

        Args:
            purpose: Shown in `pg_stat_activity` behind this database's name.
            timeout_seconds: Bound on connecting and on each statement; None is the pool's.

        Raises:
            StoreUnavailable: PostgreSQL cannot be reached.
        """
        seconds = timeout_seconds or self._timeout_seconds
        with translated_errors():
            connection: asyncpg.Connection[Record] = await asyncpg.connect(
                self._url,
                timeout=seconds,
                command_timeout=seconds,
                **self._session(f"{self._name} {purpose}"),
            )
        await _withhold_from_forks(connection)
        return connection

    def _session(self, name: str) -> dict[str, Any]:
        if self.pooler:
            return {"statement_cache_size": 0, "server_settings": {"application_name": name}}
        settings = {"application_name": name, **PLANNER}
        return {"statement_cache_size": 200, "server_settings": settings}

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        with translated_errors():
            seconds = min(self._timeout_seconds, ACQUIRE_SECONDS_MAX)
            connection = await self._pool.acquire(timeout=seconds)
            try:
                yield connection
            except asyncpg.ReadOnlySQLTransactionError:
                # This server was demoted; every pooled connection leads to it. New ones
                # follow the DSN to the new primary.
                await self._pool.expire_connections()
                raise
            finally:
                await self._pool.release(connection, timeout=self._timeout_seconds)


@contextmanager
def translated_errors() -> Iterator[None]:
    """
    Raise `StoreUnavailable` in place of the many ways in which PostgreSQL cannot serve, and
    `StatementRefused` in place of errors that quote values.
    """
    try:
        yield
    except CANNOT_SERVE as error:
        fact = str(error) or type(error).__name__
        if "unsupported startup parameter" in fact:
            # So PgBouncer refuses the settings that a connection of ours brings along.
            fact += " (behind PgBouncer, see ASYNCFLOW_DATABASE_POOLER)"
        raise StoreUnavailable(f"PostgreSQL cannot serve now: {fact}") from error
    except REFUSED as error:
        constraint = getattr(error, "constraint_name", None)
        raise StatementRefused(type(error).__name__, constraint=constraint) from None


def check_url(url: str) -> None:
    """
    Refuse a DSN that asyncpg cannot parse, before anything is started.

    Raises:
        InvalidSettings: With the reason; the password is not repeated.
    """
    try:
        parts = urlsplit(url)
        # Several hosts are fine: that is how asyncpg finds the primary after a failover.
        hosts = parts.netloc.rpartition("@")[2].split(",")
        ports = [urlsplit(f"//{host}").port for host in hosts]
    except ValueError as error:
        raise InvalidSettings([f"ASYNCFLOW_DATABASE_URL cannot be parsed: {error}."]) from None
    if parts.scheme not in ("postgresql", "postgres") or 0 in ports:
        raise InvalidSettings(
            ["ASYNCFLOW_DATABASE_URL must look like postgresql://host:5432/name."]
        )


async def _nothing_to_reset(connection: object) -> None:
    return None


async def _withhold_from_forks(connection: Any) -> None:
    socket = connection._transport.get_extra_info("socket")
    withhold(connection, socket.fileno())
