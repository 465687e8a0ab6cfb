"""
A dedicated PostgreSQL for the tests that starve it, and systems on it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.acceptance.conftest import show_logs
from tests.support import postgres
from tests.support.postgres import PostgresServer
from tests.support.system import System

MAX_CONNECTIONS = 60


@pytest.fixture(scope="session")
def own_server() -> Iterator[PostgresServer]:
    """
    A PostgreSQL that no other test uses, with a low connection limit.
    """
    settings = {"max_connections": str(MAX_CONNECTIONS)}
    with postgres.running_server(postgres.EMBEDDED, settings=settings) as server:
        yield server


@pytest.fixture
def own_database_url(own_server: PostgresServer) -> Iterator[str]:
    """
    A fresh database on it.
    """
    url = own_server.create_database()
    yield url
    own_server.drop_database(url)


@pytest.fixture
async def system(
    own_database_url: str, vhost_url: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[System]:
    """
    A system on the server that may be starved.
    """
    async with a_system(request, tmp_path, own_database_url, vhost_url) as system:
        yield system


@pytest.fixture
async def alone(
    own_database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[System]:
    """
    Like `system`, on PostgreSQL alone: for tests to which RabbitMQ makes no difference.
    """
    async with a_system(request, tmp_path, own_database_url) as system:
        yield system


@asynccontextmanager
async def a_system(
    request: pytest.FixtureRequest,
    folder: Path,
    database_url: str,
    broker_url: str | None = None,
) -> AsyncIterator[System]:
    """
    A system for one block; a failing test reports the last output of the processes.
    """
    async with System(database_url=database_url, broker_url=broker_url, folder=folder) as system:
        try:
            yield system
        finally:
            show_logs(request, system)
