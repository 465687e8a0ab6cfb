"""
The probes: live checks nothing, ready checks what accepting a task needs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI

from asyncflow.api.app import create_app
from asyncflow.api.catalogue import Catalogue
from asyncflow.settings import Settings
from asyncflow.store.database import Database
from asyncflow.store.presence import sign
from asyncflow.store.schema import SCHEMA_VERSION
from asyncflow.store.wakeups import Waker
from tests.support.postgres import PostgresServer
from tests.support.roles import administrator


@pytest.fixture
async def through_rabbitmq(db: Database, settings: Settings) -> AsyncIterator[FastAPI]:
    """
    The application of an installation with RabbitMQ; it never connects to RabbitMQ itself.
    """
    waker = Waker(db)
    settings = replace(settings, broker_url="amqp://nobody@127.0.0.1:1/nothing")
    yield create_app(db, settings, catalogue=Catalogue(db), waker=waker, version="1")
    await waker.close()


async def test_a_process_without_a_database_is_live(offline_client: httpx.AsyncClient) -> None:
    """
    The live probe stays green without a database: restarting the process would not help.
    """
    answer = await offline_client.get("/health/live")

    assert (200, {"status": "live"}) == (answer.status_code, answer.json())


async def test_ready_proves_a_write(client: httpx.AsyncClient, db: Database) -> None:
    """
    The answer is 200 with the schema's version and the broker's state, after a row was written.
    """
    await sign(db, relay_trouble=None)
    before = await db.fetchval("SELECT written_at FROM asyncflow.probe")
    answer = await client.get("/health/ready")

    assert 200 == answer.status_code
    assert answer.json() == {
        "status": "ready",
        "schema_version": SCHEMA_VERSION,
        "broker": "not used",
        "maintenance": "running",
    }
    assert await db.fetchval("SELECT written_at FROM asyncflow.probe") > before


async def test_a_database_that_takes_no_writes_is_not_ready(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    A read-only server answers queries, but the load balancer must not send it requests.
    """
    name = await db.fetchval("SELECT current_database()")
    await db.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await db._pool.expire_connections()
    answer = await client.get("/health/ready")

    assert 503 == answer.status_code
    assert "/problems/unavailable" == answer.json()["type"]


@pytest.mark.parametrize("right", ["INSERT ON asyncflow.tasks", "USAGE ON SCHEMA asyncflow"])
async def test_a_database_that_would_refuse_a_submission_is_not_ready(
    right: str, postgres_server: PostgresServer, database_url: str, settings: Settings
) -> None:
    """
    Every privilege that a submission needs counts; a write to another table proves nothing.
    """
    async with (
        administrator(postgres_server, database_url) as admin,
        Database(admin.url) as db,
    ):
        waker = Waker(db)
        app = create_app(db, settings, catalogue=Catalogue(db), waker=waker, version="1")
        before = await _ready(app)
        await admin.execute(f"REVOKE {right} FROM {{role}}")
        without = await _ready(app)
        await admin.execute(f"GRANT {right} TO {{role}}")
        again = await _ready(app)
        await waker.close()
        rows = await db.fetchval("SELECT count(*) FROM asyncflow.tasks")

    assert [200, 503, 200] == [a.status_code for a in (before, without, again)]
    assert "/problems/unavailable" == without.json()["type"]
    assert 0 == rows


async def test_a_wrong_schema_is_not_ready(client: httpx.AsyncClient, db: Database) -> None:
    """
    The answer is 503; it names both versions and the remedy.
    """
    await db.execute(
        "UPDATE asyncflow.schema_version SET version_num = '9999', compatible_from = '9999'"
    )
    answer = await client.get("/health/ready")

    assert 503 == answer.status_code
    assert "/problems/schema-mismatch" == answer.json()["type"]
    assert "9999" in answer.json()["detail"]
    assert "deploy a newer version" in answer.json()["detail"]


async def test_a_newer_schema_that_serves_this_version_is_ready(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    Deployments migrate first, so processes of the old version must stay ready.
    """
    await db.execute("UPDATE asyncflow.schema_version SET version_num = '9999'")
    answer = await client.get("/health/ready")

    assert 200 == answer.status_code
    assert "9999" == answer.json()["schema_version"]


async def test_a_database_without_a_schema_is_not_ready(
    empty_database_url: str, settings: Settings
) -> None:
    """
    A database that was never migrated is not ready either.
    """
    async with Database(empty_database_url) as db:
        waker = Waker(db)
        app = create_app(db, settings, catalogue=Catalogue(db), waker=waker, version="1")
        answer = await _ready(app)
        await waker.close()

    assert 503 == answer.status_code
    assert "/problems/schema-mismatch" == answer.json()["type"]


async def test_a_broken_broker_is_told_but_does_not_matter(
    db: Database, through_rabbitmq: FastAPI
) -> None:
    """
    A broken broker is reported; tasks are accepted without it, so the API stays ready.
    """
    await sign(db, relay_trouble=None)
    working = await _ready(through_rabbitmq)
    await sign(db, relay_trouble="It cannot be reached.")
    broken = await _ready(through_rabbitmq)

    assert (200, "up") == (working.status_code, working.json()["broker"])
    assert (200, "unusable: It cannot be reached.") == (broken.status_code, broken.json()["broker"])


async def test_without_maintenance_the_state_of_the_broker_is_not_known(
    db: Database, through_rabbitmq: FastAPI
) -> None:
    """
    Without a recent report from maintenance, the state of the broker is unknown.
    """
    never = await _ready(through_rabbitmq)
    await sign(db, relay_trouble=None)
    await db.execute("UPDATE asyncflow.maintenance SET seen_at = now() - interval '65 seconds'")
    gone = await _ready(through_rabbitmq)

    assert [200, 200] == [answer.status_code for answer in (never, gone)]
    assert all(answer.json()["broker"].startswith("unknown") for answer in (never, gone))


async def test_without_maintenance_ready_is_degraded(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    The status is 200, since tasks are accepted; `degraded` makes it visible.
    """
    never = (await client.get("/health/ready")).json()
    await sign(db, relay_trouble=None)
    running = (await client.get("/health/ready")).json()
    await db.execute("UPDATE asyncflow.maintenance SET seen_at = now() - interval '65 seconds'")
    answer = await client.get("/health/ready")
    gone = answer.json()

    assert 200 == answer.status_code
    assert ["degraded", "ready", "degraded"] == [a["status"] for a in (never, running, gone)]
    assert "not running, never seen" in never["maintenance"]
    assert "running" == running["maintenance"]
    assert "not running, last seen 65 seconds ago" in gone["maintenance"]


async def test_what_the_relay_cannot_do_is_told_as_the_brokers_state(
    db: Database, through_rabbitmq: FastAPI
) -> None:
    """
    The broker's state is what the relay reports: a connection made by the API would not test the
    relay's permissions.
    """
    await sign(db, relay_trouble="User 'a' lacks the write permission.")
    answer = await _ready(through_rabbitmq)

    assert 200 == answer.status_code
    assert "degraded" == answer.json()["status"]
    assert "unusable: User 'a' lacks the write permission." == answer.json()["broker"]


async def _ready(app: FastAPI) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        return await client.get("/health/ready")
