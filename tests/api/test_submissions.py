"""
`POST /tasks` and `POST /tasks/batch`: what is accepted, stored and answered.
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest

from asyncflow.store.database import Database
from asyncflow.store.read import get
from asyncflow.store.wakeups import Listener
from asyncflow.wire.fields import rfc3339
from asyncflow.wire.submissions import SubmittedTask


async def stored_tasks(db: Database) -> int:
    count: int = await db.fetchval("SELECT count(*) FROM asyncflow.tasks")
    return count


def in_seconds(seconds: float) -> str:
    return rfc3339(datetime.now(UTC) + timedelta(seconds=seconds))


async def test_a_submitted_task_is_stored_before_it_is_answered(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    The smallest request gets 202, a Location, and a row with the defaults.
    """
    answer = await client.post("/tasks", json={"name": "sample-task"})

    assert 202 == answer.status_code
    view = SubmittedTask.model_validate_json(answer.content, strict=True)
    assert answer.headers["location"] == f"/tasks/{view.id}"
    assert (
        "sample-task",
        "PENDING",
        "default",
        4,
    ) == (view.name, view.status, view.queue, view.priority)
    assert view.run_at == view.created_at
    assert 7 == view.id.version
    task = await get(db, 1, view.id)
    assert (task.name, task.payload, task.created_at) == ("sample-task", "{}", view.created_at)
    assert (None, None, None) == (task.max_attempts, task.timeout_seconds, task.expires_at)


async def test_every_field_reaches_the_row(client: httpx.AsyncClient, db: Database) -> None:
    """
    Every field of a submission is stored, with times in UTC.
    """
    answer = await client.post(
        "/tasks",
        json={
            "name": "charge",
            "payload": {"order": 17, "note": 'naïve 🎉 \\ " \u2028', "deep": [[{"a": None}]]},
            "queue": "billing",
            "priority": 9,
            "run_at": "2031-05-01T12:00:00.25+02:00",
            "max_attempts": 3,
            "timeout_seconds": 1.5,
            "expires_at": "2031-05-01T10:00:01z",
        },
    )

    assert 202 == answer.status_code
    assert "SCHEDULED" == answer.json()["status"]
    assert "2031-05-01T10:00:00.250000Z" == answer.json()["run_at"]
    assert "2031-05-01T10:00:01.000000Z" == answer.json()["expires_at"]
    task = await get(db, 1, UUID(answer.json()["id"]))
    assert {
        "order": 17,
        "note": 'naïve 🎉 \\ " \u2028',
        "deep": [[{"a": None}]],
    } == json.loads(task.payload or "")
    assert ("billing", 9) == (task.queue, task.priority)
    assert (3, 1.5) == (task.max_attempts, task.timeout_seconds)
    assert task.run_at == datetime(2031, 5, 1, 10, 0, 0, 250_000, UTC)


async def test_a_delay_counts_from_the_databases_clock(client: httpx.AsyncClient) -> None:
    """
    `delay_seconds` is added to `created_at`, exactly.
    """
    answer = await client.post("/tasks", json={"name": "later", "delay_seconds": 90.5})

    view = SubmittedTask.model_validate_json(answer.content)
    assert "SCHEDULED" == view.status
    assert view.run_at - view.created_at == timedelta(seconds=90.5)


async def test_a_payload_is_stored_as_compact_json(client: httpx.AsyncClient, db: Database) -> None:
    """
    Insignificant spaces are removed, escapes become characters, and the order of keys is kept.
    """
    body = b'{"name": "x", "payload": {"b" : 1.50, "a": "\\u00e9\\ud83c\\udf89\\/" }}'
    answer = await client.post("/tasks", content=body, headers={"Content-Type": "application/json"})

    task = await get(db, 1, UUID(answer.json()["id"]))
    assert '{"b":1.5,"a":"é🎉/"}' == task.payload


WRONG_TASKS: list[tuple[Any, list[str]]] = [
    ({}, ["/name"]),
    ([], [""]),
    ("sample-task", [""]),
    (False, [""]),
    (7, [""]),
    ({"name": ""}, ["/name"]),
    ({"name": "a b"}, ["/name"]),
    ({"name": "a\n"}, ["/name"]),
    ({"name": "ä"}, ["/name"]),
    ({"name": "x" * 129}, ["/name"]),
    ({"name": "../../etc"}, ["/name"]),
    ({"name": 5}, ["/name"]),
    ({"name": None}, ["/name"]),
    ({"name": ["x"]}, ["/name"]),
    ({"name": "x", "payload": []}, ["/payload"]),
    ({"name": "x", "payload": "{}"}, ["/payload"]),
    ({"name": "x", "payload": None}, ["/payload"]),
    ({"name": "x", "queue": "two words"}, ["/queue"]),
    ({"name": "x", "queue": ""}, ["/queue"]),
    ({"name": "x", "priority": 10}, ["/priority"]),
    ({"name": "x", "priority": -1}, ["/priority"]),
    ({"name": "x", "priority": "4"}, ["/priority"]),
    ({"name": "x", "priority": 4.0}, ["/priority"]),
    ({"name": "x", "priority": True}, ["/priority"]),
    ({"name": "x", "priority": None}, ["/priority"]),
    ({"name": "x", "run_at": "2031-05-01T12:00:00"}, ["/run_at"]),
    ({"name": "x", "run_at": "2031-05-01"}, ["/run_at"]),
    ({"name": "x", "run_at": "2031-02-30T12:00:00Z"}, ["/run_at"]),
    ({"name": "x", "run_at": "0001-01-01T00:00:00+14:00"}, ["/run_at"]),
    ({"name": "x", "run_at": "9999-12-31T23:59:59-12:00"}, ["/run_at"]),
    ({"name": "x", "run_at": "٢٠٣١-05-01T12:00:00Z"}, ["/run_at"]),
    ({"name": "x", "run_at": 1_900_000_000}, ["/run_at"]),
    ({"name": "x", "run_at": "tomorrow"}, ["/run_at"]),
    ({"name": "x", "delay_seconds": -0.1}, ["/delay_seconds"]),
    ({"name": "x", "delay_seconds": 34_560_001}, ["/delay_seconds"]),
    ({"name": "x", "delay_seconds": "5"}, ["/delay_seconds"]),
    (
        {"name": "x", "run_at": "2031-05-01T12:00:00Z", "delay_seconds": 5},
        ["/delay_seconds"],
    ),
    ({"name": "x", "max_attempts": 0}, ["/max_attempts"]),
    ({"name": "x", "max_attempts": 1001}, ["/max_attempts"]),
    ({"name": "x", "timeout_seconds": 0}, ["/timeout_seconds"]),
    ({"name": "x", "timeout_seconds": 604_801}, ["/timeout_seconds"]),
    ({"name": "x", "expires_at": "2020-01-01T00:00:00Z"}, ["/expires_at"]),
    (
        {
            "name": "x",
            "run_at": "2031-05-01T12:00:00Z",
            "expires_at": "2031-05-01T14:00:00+02:00",
        },
        ["/expires_at"],
    ),
    ({"name": "x", "nmae": 1}, ["/nmae"]),
    ({"name": "x", "a/b~c": 1}, ["/a~1b~0c"]),
    ({"nam": "x", "priority": 11, "extra": 1}, ["/name", "/priority", "/nam", "/extra"]),
]


@pytest.mark.parametrize(("task", "pointers"), WRONG_TASKS, ids=lambda value: str(value)[:60])
async def test_a_wrong_task_is_refused_with_a_pointer_to_each_fault(
    offline_client: httpx.AsyncClient, task: Any, pointers: list[str]
) -> None:
    """
    The answer is 422 and names every error, before the database is accessed, alone and in a batch.
    """
    alone = await offline_client.post("/tasks", json=task)
    batched = await offline_client.post("/tasks/batch", json={"tasks": [{"name": "good"}, task]})

    assert alone.status_code == batched.status_code == 422
    assert "application/problem+json" == alone.headers["content-type"]
    assert "/problems/invalid-task" == alone.json()["type"]
    assert pointers == [error["pointer"] for error in alone.json()["errors"]]
    assert [f"/tasks/1{pointer}" for pointer in pointers] == [
        error["pointer"] for error in batched.json()["errors"]
    ]


async def test_a_fault_says_what_would_have_worked(offline_client: httpx.AsyncClient) -> None:
    """
    These are the exact sentences that users read.
    """
    task = {
        "name": "a b",
        "priority": 12,
        "payload": 1,
        "run_at": "soon",
        "delay_seconds": 1e9,
        "prioritty": 1,
    }
    answer = await offline_client.post("/tasks", json=task)

    assert answer.json()["detail"] == (
        "/name must be 1-128 characters from [A-Za-z0-9._-]. (One of 6 errors; see `errors`.)"
    )
    assert {
        "/name": "must be 1-128 characters from [A-Za-z0-9._-]",
        "/priority": "must be at most 9",
        "/payload": "must be an object",
        "/run_at": "must be an RFC 3339 time with its offset, such as 2030-01-31T09:30:00Z "
        "or 2030-01-31T10:30:00+01:00",
        "/delay_seconds": "must be at most 34560000",
        "/prioritty": "is not known (did you mean priority?); allowed are name, payload, "
        "queue, priority, run_at, delay_seconds, max_attempts, timeout_seconds, expires_at",
    } == {error["pointer"]: error["detail"] for error in answer.json()["errors"]}


async def test_a_task_that_would_expire_before_its_delay_is_refused(
    client: httpx.AsyncClient,
) -> None:
    """
    `expires_at` must be later than the end of `delay_seconds`, otherwise the task could never run.
    """
    task = {"name": "x", "delay_seconds": 3600, "expires_at": in_seconds(1800)}
    refused = await client.post("/tasks", json=task)
    taken = await client.post("/tasks", json={**task, "expires_at": in_seconds(5400)})

    assert 422 == refused.status_code
    assert [
        {"pointer": "/expires_at", "detail": "must be later than the end of `delay_seconds`"}
    ] == refused.json()["errors"]
    assert 202 == taken.status_code


async def test_a_payload_beyond_the_limit_is_refused(
    client: httpx.AsyncClient, settings: Any
) -> None:
    """
    The limit counts bytes of compact JSON in UTF-8, not characters and not spaces.
    """
    room = settings.payload_bytes_max - len('{"x":""}')
    fits = await client.post("/tasks", json={"name": "x", "payload": {"x": "é" * (room // 2)}})
    exceeds = await client.post(
        "/tasks", json={"name": "x", "payload": {"x": "é" * (room // 2) + "abc"}}
    )

    assert 202 == fits.status_code
    assert 422 == exceeds.status_code
    assert "/payload" == exceeds.json()["errors"][0]["pointer"]
    assert f"at most {settings.payload_bytes_max} are accepted" in exceeds.json()["detail"]


async def test_a_batch_is_answered_in_its_order(client: httpx.AsyncClient, db: Database) -> None:
    """
    A thousand tasks in one batch are all stored, and answered in the order in which they were sent.
    """
    tasks = [{"name": f"n-{i}", "priority": i % 10, "payload": {"i": i}} for i in range(1000)]
    answer = await client.post("/tasks/batch", json={"tasks": tasks})

    assert 202 == answer.status_code
    views = answer.json()["tasks"]
    assert [task["name"] for task in tasks] == [view["name"] for view in views]
    assert sorted(view["id"] for view in views) == [view["id"] for view in views]
    assert 1000 == await stored_tasks(db)
    last = await get(db, 1, UUID(views[-1]["id"]))
    assert '{"i":999}' == last.payload


@pytest.mark.parametrize(
    ("batch", "pointer"),
    [
        ({}, "/tasks"),
        ([], ""),
        ({"tasks": {}}, "/tasks"),
        ({"tasks": []}, "/tasks"),
        ({"tasks": [{"name": "x"}] * 1001}, "/tasks"),
        ({"tasks": [{"name": "x"}, 3]}, "/tasks/1"),
        ({"tasks": [{"name": "x"}], "all": True}, "/all"),
        ({"tasks": [{"name": "x"}] * 9 + [{"name": "x", "payload": 1}]}, "/tasks/9/payload"),
        ({"tasks": [{"name": "x", "payload": {"x": "y" * 200_000}}]}, "/tasks/0/payload"),
        (
            {"tasks": [{"name": "x"}, {"name": "x", "expires_at": "2020-01-01T00:00:00Z"}]},
            "/tasks/1/expires_at",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_a_batch_with_a_fault_is_refused_as_a_whole(
    offline_client: httpx.AsyncClient, batch: Any, pointer: str
) -> None:
    """
    The batch is refused before the database is accessed, with a pointer to the invalid task.
    """
    answer = await offline_client.post("/tasks/batch", json=batch)

    assert 422 == answer.status_code
    assert answer.json()["errors"][0]["pointer"] == pointer


async def test_a_batch_postgresql_refuses_is_stored_not_at_all(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    The batch is all or nothing, even if only the database finds the error.
    """
    await db.execute("ALTER TABLE asyncflow.tasks ADD CHECK (name <> 'refused')")
    answer = await client.post("/tasks/batch", json={"tasks": [{"name": "x"}, {"name": "refused"}]})

    assert 500 == answer.status_code
    assert 0 == await stored_tasks(db)


async def test_concurrent_submissions_share_inserts_and_get_their_own_answers(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    200 concurrent clients create 200 rows, and each gets the answer for its own task.
    """
    answers = await asyncio.gather(
        *(client.post("/tasks", json={"name": f"n-{i}", "payload": {"i": i}}) for i in range(200))
    )

    assert [f"n-{i}" for i in range(200)] == [answer.json()["name"] for answer in answers]
    rows = await db.fetch("SELECT id::text, name, created_at FROM asyncflow.tasks")
    assert {(a.json()["id"], a.json()["name"]) for a in answers} == {
        (row["id"], row["name"]) for row in rows
    }
    # now() is the time of the transaction: there are far fewer transactions than tasks.
    assert len({row["created_at"] for row in rows}) < 50


async def test_a_task_postgresql_refuses_fails_alone(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    One bad row does not fail the other submissions of its batch.
    """
    await db.execute("ALTER TABLE asyncflow.tasks ADD CHECK (name <> 'refused')")
    answers = await asyncio.gather(
        *(client.post("/tasks", json={"name": "refused" if i == 7 else "x"}) for i in range(20))
    )

    assert [500 if i == 7 else 202 for i in range(20)] == [a.status_code for a in answers]
    assert 19 == await stored_tasks(db)


async def test_a_due_submission_wakes_listeners_and_a_later_one_does_not(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    Listeners are notified of a due task immediately, and of a later one not at all.
    """
    heard: asyncio.Queue[None] = asyncio.Queue()
    async with Listener(db, lambda: heard.put_nowait(None)):
        await asyncio.wait_for(heard.get(), 5)  # The listener is connected now.
        await client.post("/tasks", json={"name": "x", "delay_seconds": 60})
        await client.post("/tasks/batch", json={"tasks": [{"name": "x", "delay_seconds": 60}]})
        silent = heard.empty()
        await client.post("/tasks", json={"name": "x"})
        await asyncio.wait_for(heard.get(), 5)

    assert silent
    assert heard.empty()
