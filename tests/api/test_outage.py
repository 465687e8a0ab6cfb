"""
During a database outage the API refuses requests quickly, says when to retry, and recovers by
itself.
"""

from __future__ import annotations

import asyncio

import httpx

from asyncflow.api.catalogue import Catalogue
from tests.support.postgres import PostgresServer

UNKNOWN = "/tasks/0192f0c1-2b3c-7d4e-8f50-123456789abc"


async def test_without_a_database_every_endpoint_asks_to_retry(
    offline_client: httpx.AsyncClient,
) -> None:
    """
    The answer is 503 with Retry-After, without PostgreSQL's message, which names hosts and users.
    """
    answers = [
        await offline_client.post("/tasks", json={"name": "x"}),
        await offline_client.post("/tasks/batch", json={"tasks": [{"name": "x"}]}),
        await offline_client.get("/tasks"),
        await offline_client.get(UNKNOWN),
        await offline_client.post(f"{UNKNOWN}/cancel"),
        await offline_client.post(f"{UNKNOWN}/redrive"),
        await offline_client.post(f"{UNKNOWN}/run-now"),
        await offline_client.get("/health/ready"),
    ]

    for answer in answers:
        assert 503 == answer.status_code
        assert "1" == answer.headers["retry-after"]
        assert "/problems/unavailable" == answer.json()["type"]
        assert "127.0.0.1" not in answer.text
        assert "nobody" not in answer.text


async def test_the_api_recovers_by_itself_when_the_database_returns(
    client: httpx.AsyncClient, catalogue: Catalogue, postgres_server: PostgresServer
) -> None:
    """
    The database crashes and restarts: requests get 503 meanwhile and 202 afterwards, and no
    accepted task is lost.
    """
    kept = await client.post("/tasks", json={"name": "kept"})
    async with catalogue:
        await asyncio.to_thread(postgres_server.cluster.stop, "immediate")
        try:
            refused = await client.post("/tasks", json={"name": "x"})
            live = await client.get("/health/live")
        finally:
            await asyncio.to_thread(postgres_server.cluster.start)
        async with asyncio.timeout(30):
            while True:
                ready = await client.get("/health/ready")
                if ready.status_code == 200:
                    break
                await asyncio.sleep(float(ready.headers["retry-after"]) / 10)
        taken = await client.post("/tasks", json={"name": "y"})

    assert (503, 200) == (refused.status_code, live.status_code)
    assert (200, 202) == (ready.status_code, taken.status_code)
    listed = (await client.get("/tasks")).json()["tasks"]
    assert [taken.json()["id"], kept.json()["id"]] == [task["id"] for task in listed]
