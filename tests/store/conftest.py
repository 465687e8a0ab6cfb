"""
The store's tests talk to PostgreSQL through `Database`, as the product does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from asyncflow.store.database import Database
from tests.support.postgres import PostgresServer

TABLES = ("tasks", "attempts", "workers", "publications", "queues", "maintenance")


@pytest.fixture(scope="session")
def shared_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """
    The DSN of one migrated database, shared by all of these tests.
    """
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
async def db(shared_database_url: str) -> AsyncIterator[Database]:
    """
    A pool on an emptied database: for hundreds of tests, emptying is faster than creating.
    """
    async with Database(shared_database_url, size=8) as database:
        for table in TABLES:
            await database.execute(f"DELETE FROM asyncflow.{table}")
        yield database


@pytest.fixture
async def fresh_db(database_url: str) -> AsyncIterator[Database]:
    """
    A pool on a dedicated database, for a test that must be alone in it.
    """
    async with Database(database_url, size=8) as database:
        yield database


@pytest.fixture
async def connection(fresh_db: Database) -> AsyncIterator[asyncpg.Connection]:
    """
    A connection to `fresh_db`, with the settings that the product uses for every connection.
    """
    one = await fresh_db.connect("test")
    yield one
    await one.close()


@pytest.fixture
def role_url(postgres_server: PostgresServer, empty_database_url: str) -> Iterator[str]:
    """
    The DSN of the empty database for a role without any privileges.
    """
    url = postgres_server.create_role(empty_database_url)
    yield url
    postgres_server.drop_role(url)
