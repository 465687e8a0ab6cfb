"""
A role with exactly the privileges that AsyncFlow needs, as a careful administrator would create it,
and that administrator, who revokes and restores privileges.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from tests.support.postgres import PostgresServer

GRANTS = """
    GRANT USAGE ON SCHEMA asyncflow TO {role};
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA asyncflow TO {role};
"""

_numbers = itertools.count(1)


class Administrator:
    """
    The superuser of one database, and AsyncFlow's role in it.

    Attributes:
        role: The name of the role.
        url: The DSN for AsyncFlow.
        own_url: The DSN for the superuser.
    """

    def __init__(self, server: PostgresServer, database_url: str, db: asyncpg.Connection) -> None:
        self.role = f"app_{os.getpid()}_{next(_numbers)}"
        self.own_url = database_url
        self.database = urlsplit(database_url).path[1:]
        parts = urlsplit(database_url)
        socket_or_host = parts.netloc.rpartition("@")[2]
        self.url = parts._replace(netloc=f"{self.role}:secret@{socket_or_host}").geturl()
        self._server = server
        self._db = db

    async def execute(self, statements: str) -> None:
        """
        Run statements, with `{role}` and `{database}` replaced.
        """
        await self._db.execute(statements.format(role=self.role, database=self.database))

    async def count(self, query: str) -> int:
        """
        Run a query that returns a number.
        """
        return int(await self._db.fetchval(query))

    async def end_sessions(self) -> None:
        """
        Terminate all current sessions of the role, and wait until they have ended.
        """
        theirs = "SELECT pid FROM pg_stat_activity WHERE usename = $1"
        ended = [row["pid"] for row in await self._db.fetch(theirs, self.role)]
        await self._db.fetch("SELECT pg_terminate_backend(pid) FROM unnest($1::int[]) pid", ended)
        alive = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ANY ($1))"
        while True:
            if not await self._db.fetchval(alive, ended):
                return
            await asyncio.sleep(0.005)

    async def waits_for_a_lock(self) -> bool:
        """
        Whether a session of the role is waiting for a lock.
        """
        waiting = await self._db.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock'",
            self.role,
        )
        return bool(waiting)

    async def ask_for_password(self) -> None:
        """
        Require the role's password, even over the Unix socket.
        """
        file = Path(await self._db.fetchval("SHOW hba_file"))
        file.write_text(f"local all {self.role} scram-sha-256\n{file.read_text()}")
        await self._db.execute("SELECT pg_reload_conf()")


@asynccontextmanager
async def administrator(server: PostgresServer, database_url: str) -> AsyncIterator[Administrator]:
    """
    Create the role for one block.
    """
    db = await asyncpg.connect(database_url)
    admin = Administrator(server, database_url, db)
    try:
        await admin.execute("CREATE ROLE {role} LOGIN PASSWORD 'secret'")
        await admin.execute(GRANTS)
        yield admin
    finally:
        await admin.end_sessions()
        await admin.execute("DROP OWNED BY {role}; DROP ROLE {role}")
        await db.close()
