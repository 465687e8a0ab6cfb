"""
PostgreSQL servers for the tests, one per major version, and databases in them.

A server lives in a temporary folder and ends with the test run. A database for a test
is a copy of a migrated template, which takes a few hundredths of a second.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from asyncflow.embedded import Cluster
from asyncflow.embedded.cluster import _package_bin_folder
from tests.support import scratch

# Newest first: the embedded version, and the oldest supported one.
EMBEDDED = "18"
OLDEST = "15"
MAJORS = (EMBEDDED, OLDEST)

OLDEST_BIN_FOLDERS = (
    "/usr/lib/postgresql/15/bin",
    "/usr/pgsql-15/bin",
    "/opt/homebrew/opt/postgresql@15/bin",
    "/usr/local/opt/postgresql@15/bin",
)

WHAT_WOULD_HELP = (
    f"install it (`apt-get install postgresql-{OLDEST}`, `brew install postgresql@{OLDEST}`), "
    "or name the folder of its programs in ASYNCFLOW_TEST_POSTGRES_BIN, "
    "or leave these tests out with --postgres=18"
)

SETTINGS = {"max_connections": "200", "max_wal_size": "512MB", "checkpoint_timeout": "30min"}

TEMPLATE = "migrated"


class PostgresServer:
    """
    A running server of one major version; a test may kill and start it.
    """

    def __init__(self, cluster: Cluster, major: str) -> None:
        self.cluster = cluster
        self.major = major
        self._numbers = itertools.count(1)
        self._has_template = False

    def create_empty_database(self, *, encoding: str = "UTF8") -> str:
        """
        Create a database without tables and return its DSN.
        """
        if encoding == "UTF8":
            return self._create("template1")
        return self._create(f"template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'")

    def create_database(self) -> str:
        """
        Create a database with AsyncFlow's schema and return its DSN.
        """
        if not self._has_template:
            self._create_template()
        return self._create(TEMPLATE)

    def create_role(self, database_url: str) -> str:
        """
        Create a role without any privileges and return the DSN of the database for that role.
        """
        name = f"role_{next(self._numbers)}"
        self._run(f"CREATE ROLE {name} LOGIN")
        return (
            urlsplit(database_url)
            ._replace(netloc=urlsplit(database_url).netloc.replace("postgres", name))
            .geturl()
        )

    def drop_role(self, url: str) -> None:
        """
        Drop a role and everything that it owns in the database of its DSN.
        """
        name = str(urlsplit(url).username)
        as_superuser = self._url(urlsplit(url).path[1:])
        asyncio.run(_execute(as_superuser, f"DROP OWNED BY {name} CASCADE"))
        self._run(f"DROP ROLE {name}")

    def drop_database(self, url: str) -> None:
        """
        Drop a database, even if clients forgot to disconnect.
        """
        self._run(f"DROP DATABASE {urlsplit(url).path[1:]} WITH (FORCE)")

    def program(self, name: str) -> Path:
        """
        A program of this version, such as `pg_dump`.
        """
        folder = _oldest_bin_folder() if self.major == OLDEST else _package_bin_folder()
        assert folder is not None
        return folder / name

    def _create(self, template: str) -> str:
        name = f"test_{next(self._numbers)}"
        self.cluster.start()  # The previous test may have left it stopped.
        # Copying files costs half as much as writing the pages through the WAL.
        self._run(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return self._url(name)

    def _create_template(self) -> None:
        from asyncflow.store.migrations import migrate

        self._run(f"DROP DATABASE IF EXISTS {TEMPLATE}")
        self._run(f"CREATE DATABASE {TEMPLATE}")
        asyncio.run(migrate(self._url(TEMPLATE)))
        self._has_template = True

    def _url(self, database: str) -> str:
        return urlsplit(self.cluster.url)._replace(path=f"/{database}").geturl()

    def _run(self, statement: str) -> None:
        asyncio.run(_execute(self.cluster.url, statement))


@contextmanager
def running_server(
    major: str, *, folder: Path | None = None, settings: Mapping[str, str] | None = None
) -> Iterator[PostgresServer]:
    """
    Run a server until the end of the block, or skip the test if it is not installed.

    Args:
        folder: An empty folder, emptied again at the end; None creates one.
        settings: Server settings, in addition to `SETTINGS` or overriding them.
    """
    bin_folder = _oldest_bin_folder() if major == OLDEST else None
    if lacking := missing([major]):
        pytest.skip(lacking[0])
    folder = folder or scratch.make_folder("postgres", in_memory=True)
    all_settings = {**SETTINGS, **(settings or {})}
    try:
        with Cluster(folder, bin_folder=bin_folder, settings=all_settings) as cluster:
            yield PostgresServer(cluster, major)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def missing(majors: Sequence[str]) -> list[str]:
    """
    Which of these versions this machine lacks, and what would help; empty if it has all.
    """
    if OLDEST in majors and _oldest_bin_folder() is None:
        return [f"There is no PostgreSQL {OLDEST} here: {WHAT_WOULD_HELP}."]
    return []


def _oldest_bin_folder() -> Path | None:
    chosen = os.environ.get("ASYNCFLOW_TEST_POSTGRES_BIN")
    for folder in map(Path, [chosen] if chosen else OLDEST_BIN_FOLDERS):
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    return None


async def _execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
