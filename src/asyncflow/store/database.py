"""
One bounded connection pool per process, with honest errors.

`Database` runs single statements and short transactions. It retries statements that PostgreSQL
rolled back (deadlocks, serialization failures) and turns every "cannot serve now" into
`StoreUnavailable`, so that callers handle one error; `sqlstates` lists which errors those are. It
never repeats a statement with an unknown outcome: that is the caller's decision.

A firewall or a NAT may drop a connection silently. So connections have TCP keepalives, which
prevent that, and detect it soon if it happens. And when one connection turns out to be dead, all
connections that were open then are replaced: they took the same route.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

import asyncpg

from asyncflow.errors import StatementRefused, StoreUnavailable
from asyncflow.forking import withhold
from asyncflow.store.dsn import connection_arguments
from asyncflow.store.sqlstates import MISSING, NO_RIGHT, Meaning, meaning_of, meaning_of_state

TRIES_MAX = 5
ACQUIRE_SECONDS_MAX = 3.0
"""A request that has waited this long for a connection is better told to come back."""

CANCEL_SHARE, CANCEL_SECONDS_MIN = 0.1, 0.5
"""The share of a statement's time limit that PostgreSQL has to confirm its cancellation. A
connection without that confirmation is dead."""

KEEPALIVE = {
    "TCP_KEEPIDLE": 15,
    "TCP_KEEPALIVE": 15,  # The same on macOS.
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
}
"""In seconds; less than the idle timeout of any firewall."""

PLANNER = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_bitmapscan": "off",
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}
"""Every statement has an index made for it, and the tables swing between empty and millions of
rows faster than their statistics. A plan made while a table was empty would otherwise scan the
table as long as the connection lives (measured: claims at 2 % of their rate).

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

    Opening does not connect; the first statement does, so that processes can start before their
    database.

    Args:
        url: A `postgresql://` URL of the primary, see `dsn`.
        size: Maximum number of connections.
        timeout_seconds: Limit on waiting for a connection, and again on each statement, including
            the time to cancel one that is too slow.
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
        self.pooler = pooler
        self._to_server = connection_arguments(url)
        self._name = name
        self._timeout_seconds = timeout_seconds
        self._cancel_seconds = max(CANCEL_SECONDS_MIN, CANCEL_SHARE * timeout_seconds)
        self._generation = 0
        self._pool = asyncpg.create_pool(
            **self._to_server,
            min_size=0,
            max_size=size,
            timeout=timeout_seconds,
            command_timeout=max(timeout_seconds - self._cancel_seconds, timeout_seconds / 2),
            max_inactive_connection_lifetime=300,
            init=self._prepare,
            # Our statements leave no session state; the default reset costs a round trip.
            reset=_nothing_to_reset,
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
            except StoreUnavailable as error:
                if meaning_of_state(error.sqlstate) is not Meaning.ROLLED_BACK or not tries_left:
                    raise
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
                **self._to_server,
                timeout=seconds,
                command_timeout=seconds,
                **self._session(f"{self._name} {purpose}"),
            )
        await self._prepare(connection)
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
            generation = self._generation
            try:
                yield connection
            except Exception as error:
                if meaning_of(error) is Meaning.RECONNECT and not isinstance(error, TimeoutError):
                    # Broken, or the server was demoted. New ones follow the DSN to wherever
                    # it leads now.
                    await self._expire(generation)
                raise
            finally:
                try:
                    await self._pool.release(connection, timeout=self._cancel_seconds)
                except TimeoutError:
                    # A statement took too long, and PostgreSQL does not confirm its end.
                    await self._expire(generation)

    async def _expire(self, generation: int) -> None:
        """
        Replace every connection as old as one that failed, unless that has been done.
        """
        if generation == self._generation:
            self._generation += 1
            await self._pool.expire_connections()

    async def _prepare(self, connection: Any) -> None:
        """
        Keep this connection from forked children, and let the kernel close it soon after its other
        end has vanished.
        """
        sock = connection._transport.get_extra_info("socket")
        if sock is None:
            return
        withhold(connection, sock.fileno())
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {**KEEPALIVE, "TCP_USER_TIMEOUT": int(1000 * self._timeout_seconds)}
        for name, value in options.items():
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


@contextmanager
def translated_errors() -> Iterator[None]:
    """
    Raise `StoreUnavailable` for every way in which PostgreSQL cannot serve, and `StatementRefused`
    for errors that quote values; see `sqlstates`.
    """
    try:
        yield
    except Exception as error:
        meaning = meaning_of(error)
        if meaning is None or meaning is Meaning.BUG:
            raise
        if meaning is Meaning.REFUSED:
            constraint = getattr(error, "constraint_name", None)
            raise StatementRefused(type(error).__name__, constraint=constraint) from None
        raise _unavailable(error, meaning) from error


def _unavailable(error: Exception, meaning: Meaning) -> StoreUnavailable:
    if not isinstance(error, asyncpg.PostgresError):
        return StoreUnavailable(
            f"PostgreSQL cannot serve now: {str(error) or type(error).__name__}"
        )
    # Without DETAIL, which may quote values.
    fact = str(error.args[0]) if error.args else type(error).__name__
    if "unsupported startup parameter" in fact:
        # PgBouncer refuses the settings that our connections ask for.
        fact += " (behind PgBouncer, see ASYNCFLOW_DATABASE_POOLER)"
    elif error.sqlstate == NO_RIGHT:
        fact += "; `asyncflow grants` prints what a role needs"
    elif error.sqlstate in MISSING:
        fact += "; restore it, or run `asyncflow migrate`"
    is_fatal = (error.severity_en or error.severity) in ("FATAL", "PANIC")
    return StoreUnavailable(
        f"PostgreSQL cannot serve now: {fact}",
        sqlstate=error.sqlstate,
        session_lives=meaning is not Meaning.RECONNECT and not is_fatal,
    )


async def _nothing_to_reset(connection: object) -> None:
    return None
