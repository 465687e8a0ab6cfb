"""
What workers publish: default queues, and schemas that check payloads before they are stored.
"""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import httpx
import pytest

from asyncflow.api.catalogue import Catalogue
from asyncflow.store.database import Database
from asyncflow.store.workers import Published, publish_handlers, stop
from tests.support.builders import a_worker

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "order": {"type": "integer", "minimum": 1},
        "lines": {"type": "array", "items": {"type": "object", "required": ["sku"]}},
        "at": {"type": "string", "format": "date-time"},
    },
    "required": ["order"],
    "additionalProperties": False,
}


async def publish(db: Database, catalogue: Catalogue, schema: dict[str, Any]) -> None:
    await publish_handlers(db, [Published("charge", "billing", schema)])
    await catalogue.refresh()


def queue_of(catalogue: Catalogue) -> str:
    return catalogue.queue_for("charge", {"order": 1}, wanted=None, pointer="")


async def test_a_known_name_gets_its_handlers_queue(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue
) -> None:
    """
    A task gets its handler's queue unless it names one; unknown names go to `default`.
    """
    await publish(db, catalogue, {"type": "object"})
    known = await client.post("/tasks", json={"name": "charge"})
    chosen = await client.post("/tasks", json={"name": "charge", "queue": "other"})
    unknown = await client.post("/tasks", json={"name": "unheard-of"})

    assert ["billing", "other", "default"] == [
        answer.json()["queue"] for answer in (known, chosen, unknown)
    ]


@pytest.mark.parametrize(
    ("payload", "faults"),
    [
        ({}, {"/payload/order": "is required"}),
        (
            {"order": "7"},
            {"/payload/order": 'does not fit the handler\'s schema: "7" is not of type "integer"'},
        ),
        (
            {"order": 0},
            {
                "/payload/order": "does not fit the handler's schema: "
                "0 is less than the minimum of 1"
            },
        ),
        ({"order": 1, "lines": [{"sku": 1}, {}]}, {"/payload/lines/1/sku": "is required"}),
        (
            {"order": 1, "a/b": 2, "c~": 3},
            {
                "/payload/a~1b": "is not a key that the handler accepts",
                "/payload/c~0": "is not a key that the handler accepts",
            },
        ),
    ],
)
async def test_a_payload_its_handler_cannot_take_is_refused(
    client: httpx.AsyncClient,
    db: Database,
    catalogue: Catalogue,
    payload: dict[str, Any],
    faults: dict[str, str],
) -> None:
    """
    The answer is 422 with pointers below /payload, or below /tasks/N/payload in a batch.
    """
    await publish(db, catalogue, SCHEMA)
    alone = await client.post("/tasks", json={"name": "charge", "payload": payload})
    batched = await client.post(
        "/tasks/batch", json={"tasks": [{"name": "x"}, {"name": "charge", "payload": payload}]}
    )

    assert alone.status_code == batched.status_code == 422
    assert alone.json()["type"] == batched.json()["type"] == "/problems/invalid-payload"
    assert {e["pointer"]: e["detail"] for e in alone.json()["errors"]} == faults
    assert {e["pointer"] for e in batched.json()["errors"]} == {f"/tasks/1{at}" for at in faults}
    assert 0 == await db.fetchval("SELECT count(*) FROM asyncflow.tasks")


async def test_a_good_payload_and_any_format_pass(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue
) -> None:
    """
    The worker judges `format`: Pydantic accepts more dates than JSON Schema does.
    """
    await publish(db, catalogue, SCHEMA)
    answer = await client.post(
        "/tasks", json={"name": "charge", "payload": {"order": 7, "at": "2031-01-01 10:00Z"}}
    )

    assert 202 == answer.status_code


async def test_many_faults_are_listed_briefly(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue
) -> None:
    """
    At most twenty errors are listed, with long values truncated, and the answer states the total.
    """
    await publish(db, catalogue, {"type": "object", "additionalProperties": {"type": "integer"}})
    payload = {f"k{i}": "v" * 900 for i in range(100)}
    answer = await client.post("/tasks", json={"name": "charge", "payload": payload})

    assert 422 == answer.status_code
    assert 20 == len(answer.json()["errors"])
    assert len(answer.content) < 20_000
    assert answer.json()["detail"].endswith("… (One of 100 errors; the first 20 are in `errors`.)")


async def test_a_payload_of_many_values_is_refused_with_its_first_error(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue
) -> None:
    """
    Finding every error would take seconds, during which no other client is served.
    """
    await publish(db, catalogue, {"properties": {"x": {"items": {"type": "integer"}}}})
    payload = {"x": ["a"] * 50_000}
    answer = await client.post("/tasks", json={"name": "charge", "payload": payload})

    assert 422 == answer.status_code
    assert ["/payload/x/0"] == [error["pointer"] for error in answer.json()["errors"]]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strange"},
        {"$ref": "http://127.0.0.1:9/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"pattern": "("},
        {"properties": {"x": {"$ref": "#/nowhere"}}},
    ],
)
async def test_a_schema_that_cannot_be_used_refuses_nothing(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue, schema: dict[str, Any]
) -> None:
    """
    With an unusable schema, which is logged, every payload is accepted and only the worker checks
    it; no reference is fetched.
    """
    await publish(db, catalogue, schema)
    answer = await client.post("/tasks", json={"name": "charge", "payload": {"x": 1}})

    assert (202, "billing") == (answer.status_code, answer.json()["queue"])


async def test_the_newest_schema_counts(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue
) -> None:
    """
    The schema of a newly deployed handler applies from the next refresh on.
    """
    await publish(db, catalogue, SCHEMA)
    refused = await client.post("/tasks", json={"name": "charge", "payload": {"new": 1}})
    await publish(db, catalogue, {"type": "object"})
    taken = await client.post("/tasks", json={"name": "charge", "payload": {"new": 1}})

    assert (422, 202) == (refused.status_code, taken.status_code)


async def test_a_running_catalogue_learns_by_itself(db: Database) -> None:
    """
    The catalogue refreshes repeatedly while it is entered.
    """
    async with Catalogue(db, refresh_seconds=0.01) as catalogue:
        assert "default" == queue_of(catalogue)
        await publish_handlers(db, [Published("charge", "billing", SCHEMA)])
        async with asyncio.timeout(5):
            while queue_of(catalogue) == "default":  # noqa: ASYNC110 - it tells nobody
                await asyncio.sleep(0.01)

    assert "billing" == queue_of(catalogue)


async def test_an_outage_leaves_the_last_copy_in_use(db: Database) -> None:
    """
    During an outage the last copy stays in use, and entering the catalogue works, too.
    """
    catalogue = Catalogue(db, refresh_seconds=0.01)
    await publish_handlers(db, [Published("charge", "billing", SCHEMA)])
    async with catalogue:
        await db.close()
        await asyncio.sleep(0.05)

    assert "billing" == queue_of(catalogue)


TO_ORDER, TO_ADDRESS = (
    {"type": "object", "properties": {key: {}}, "required": [key], "additionalProperties": False}
    for key in ("order_id", "address")
)


async def two_services(db: Database, catalogue: Catalogue) -> list[UUID]:
    """
    Two workers that declare `mail`, each with its own queue; the second is newer.
    """
    workers = []
    for queue, schema in (("shop", TO_ORDER), ("news", TO_ADDRESS)):
        worker = await a_worker(db, handlers=("mail",), handler_queues=(queue,), queues=(queue,))
        await publish_handlers(db, [Published("mail", queue, schema)])
        workers.append(worker.id)
    await catalogue.refresh()
    return workers


async def test_services_that_share_a_name_do_not_refuse_each_others_payloads(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue
) -> None:
    """
    A payload that one of the services accepts goes to that service's queue; if the task names a
    queue, the service of that queue checks the payload.
    """
    await two_services(db, catalogue)
    to_order = {"name": "mail", "payload": {"order_id": 1}}
    to_address = {"name": "mail", "payload": {"address": "a@b"}}

    answers = [await client.post("/tasks", json=task) for task in (to_order, to_address)]
    wrong = await client.post("/tasks", json={"name": "mail", "payload": {"to": 1}})
    misled = await client.post("/tasks", json={**to_order, "queue": "news"})
    elsewhere = await client.post("/tasks", json={**to_order, "queue": "slow"})

    assert ["shop", "news"] == [answer.json()["queue"] for answer in answers]
    assert (422, 422) == (wrong.status_code, misled.status_code)
    assert (202, "slow") == (elsewhere.status_code, elsewhere.json()["queue"])


async def test_services_that_share_a_name_are_reported_once(
    db: Database, catalogue: Catalogue, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    One warning tells the operators to rename one of the handlers.
    """
    await two_services(db, catalogue)
    await catalogue.refresh()

    (line,) = [line for line in capsys.readouterr().out.splitlines() if "handlers.conflict" in line]
    assert "mail" in line
    assert "news,shop" in line


async def test_a_handler_whose_workers_are_gone_gives_way_to_one_that_lives(
    client: httpx.AsyncClient, db: Database, catalogue: Catalogue
) -> None:
    """
    A handler whose workers are dead was renamed or moved, so a live one counts; without live
    workers, the newest counts.
    """
    shop, news = await two_services(db, catalogue)
    await stop(db, news)
    await catalogue.refresh()
    to_shop = await client.post("/tasks", json={"name": "mail", "payload": {"order_id": 1}})
    to_news = await client.post("/tasks", json={"name": "mail", "payload": {"address": "a@b"}})
    await stop(db, shop)
    await catalogue.refresh()
    to_nobody = await client.post("/tasks", json={"name": "mail", "payload": {"address": "a@b"}})

    assert (202, 422) == (to_shop.status_code, to_news.status_code)
    assert (202, "news") == (to_nobody.status_code, to_nobody.json()["queue"])
