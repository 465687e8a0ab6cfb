"""
The real application over a fresh database, and a client that calls it in its own process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI

from asyncflow.api.app import create_app
from asyncflow.api.catalogue import Catalogue
from asyncflow.api.front.limits import BODY_SECONDS_MAX
from asyncflow.settings import Settings
from asyncflow.store.database import Database
from asyncflow.store.wakeups import Waker

BODY_BYTES_MAX = 400_000
PAYLOAD_BYTES_MAX = 100_000


@pytest.fixture
def body_bytes_max() -> int:
    """
    A low limit, unless a test overrides it.
    """
    return BODY_BYTES_MAX


@pytest.fixture
def settings(body_bytes_max: int) -> Settings:
    """
    Settings with low limits, for a server named "api".
    """
    return Settings(
        api_hosts=("api",),
        api_body_bytes_max=body_bytes_max,
        payload_bytes_max=PAYLOAD_BYTES_MAX,
    )


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """
    The pool the application uses.
    """
    async with Database(database_url, timeout_seconds=5) as db:
        yield db


@pytest.fixture
def catalogue(db: Database) -> Catalogue:
    """
    The application's copy of the published handlers; refreshed by hand.
    """
    return Catalogue(db)


@pytest.fixture
def body_seconds_max() -> float:
    """
    The application's default, unless a test overrides it.
    """
    return BODY_SECONDS_MAX


@pytest.fixture
async def app(
    db: Database, settings: Settings, catalogue: Catalogue, body_seconds_max: float
) -> AsyncIterator[FastAPI]:
    """
    The application as `processes` makes it.
    """
    waker = Waker(db)
    yield create_app(
        db,
        settings,
        catalogue=catalogue,
        waker=waker,
        version="1.2.3",
        body_seconds_max=body_seconds_max,
    )
    await waker.close()


@pytest.fixture
async def offline_client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """
    A client of an application whose database is unreachable: any request that gets as far as the
    database is answered with 503.
    """
    async with Database("postgresql://nobody@127.0.0.1:1/nothing") as db:
        waker = Waker(db)
        app = create_app(db, settings, catalogue=Catalogue(db), waker=waker, version="1.2.3")
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            yield client
        await waker.close()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """
    A client of `app`. An unhandled exception in the application fails the test.
    """
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        yield client
