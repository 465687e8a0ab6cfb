"""
PostgreSQL is restarted and killed while tasks flow: submissions are refused meanwhile, nothing
accepted is lost, and tasks flow again within ten seconds, without a restart of AsyncFlow's
processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.acceptance.conftest import show_logs
from tests.support import postgres
from tests.support.postgres import PostgresServer
from tests.support.system import System

FLOWING_AGAIN_SECONDS = 10.0


@pytest.fixture(scope="module")
def own_server() -> Iterator[PostgresServer]:
    """
    A PostgreSQL that no other test uses.
    """
    with postgres.running_server(postgres.EMBEDDED) as server:
        yield server


@pytest.fixture
def own_database_url(own_server: PostgresServer) -> str:
    """
    A fresh database on it.
    """
    return own_server.create_database()


@pytest.fixture
async def system(
    own_database_url: str, vhost_url: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[System]:
    """
    A system on the server that tests may stop.
    """
    async with System(
        database_url=own_database_url, broker_url=vhost_url, folder=tmp_path
    ) as system:
        yield system
    show_logs(request, system)


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_database_that_restarts_costs_time_and_no_task(
    system: System, own_server: PostgresServer, mode: Literal["fast", "immediate"]
) -> None:
    """
    The API answers 503 with Retry-After while PostgreSQL is down; afterwards every task answered
    202 is completed.
    """
    await system.start(workers=2)

    async with system.load(payload={"seconds": 0.2}) as load:
        await load.has_accepted(20)
        await asyncio.to_thread(own_server.cluster.stop, mode)
        await load.is_refused()
        health = await system.client.get(f"{system.url}/health/ready")
        live = await system.client.get(f"{system.url}/health/live")
        await asyncio.to_thread(own_server.cluster.start)
        async with asyncio.timeout(FLOWING_AGAIN_SECONDS):
            await load.has_accepted(5)
            await system.finishes(load.accepted[-1])

    assert (503, 200) == (health.status_code, live.status_code)
    await system.has_lost_nothing(load)
