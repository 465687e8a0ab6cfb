"""
Reading, listing, cancelling and redriving tasks over HTTP.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID

import httpx
import pytest

from asyncflow.domain.outcome import Settlement
from asyncflow.domain.states import Event
from asyncflow.store.database import Database
from asyncflow.store.read import STATUS_FILTERS
from asyncflow.store.wakeups import Listener
from asyncflow.wire.fields import STATUSES
from asyncflow.wire.tasks import TaskPage, TaskView
from tests.support import builders
from tests.support.builders import FAILURE, NAME, claimed_due


async def submitted(client: httpx.AsyncClient, **task: Any) -> str:
    answer = await client.post("/tasks", json={"name": NAME, **task})
    assert 202 == answer.status_code
    return str(answer.json()["id"])


async def settled(db: Database, settlement: Settlement) -> None:
    [claim] = await claimed_due(db)
    assert await builders.settled(db, claim.task_id, claim.lease_id, settlement)


async def test_a_fresh_task_shows_that_no_worker_offers_its_name(client: httpx.AsyncClient) -> None:
    """
    A due task with no worker for its name says what it is waiting for.
    """
    task_id = await submitted(client, payload={"b": 1, "a": [1.0]})
    answer = await client.get(f"/tasks/{task_id}")

    assert 200 == answer.status_code
    view = TaskView.model_validate_json(answer.content)
    assert str(view.id) == task_id
    assert ("PENDING", 0, 1, None) == (view.status, view.attempt, view.generation, view.result)
    assert {"b": 1, "a": [1.0]} == view.payload
    assert view.waiting_for == (
        f"No live worker offers {NAME!r} on queue 'default'; it runs when one starts."
    )
    assert ([], None) == (view.attempts, view.error)
    assert set(answer.json()) == set(TaskView.model_fields)


async def test_the_life_of_a_task_is_visible(client: httpx.AsyncClient, db: Database) -> None:
    """
    The API shows RUNNING with a worker, RETRYING with an error, and COMPLETED with result, attempts
    and timings.
    """
    task_id = await submitted(client)
    [claim] = await claimed_due(db)
    running = (await client.get(f"/tasks/{task_id}")).json()
    retry = Settlement(Event.RETRY, delay_seconds=3600, failure=FAILURE)
    await builders.settled(db, claim.task_id, claim.lease_id, retry)
    retrying = (await client.get(f"/tasks/{task_id}")).json()
    await db.execute("UPDATE asyncflow.tasks SET run_at = now()")
    await settled(db, Settlement(Event.COMPLETE, result='{"ok": true}'))
    completed = (await client.get(f"/tasks/{task_id}")).json()

    assert ("RUNNING", 1) == (running["status"], running["attempt"])
    assert running["worker_id"] == running["attempts"][0]["worker_id"] is not None
    assert "RUNNING" == running["attempts"][0]["outcome"]
    assert running["timings"]["wait_seconds"] >= 0
    assert running["timings"]["run_seconds"] is None
    assert ("RETRYING", 1) == (retrying["status"], retrying["failures"])
    assert retrying["error"] == {
        "kind": FAILURE.kind,
        "message": FAILURE.message,
        "traceback": FAILURE.traceback,
    }
    assert retrying["timings"]["wait_seconds"] is None
    assert ("COMPLETED", {"ok": True}) == (completed["status"], completed["result"])
    assert ["RETRIED", "COMPLETED"] == [a["outcome"] for a in completed["attempts"]]
    assert completed["attempts"][0]["error"]["kind"] == FAILURE.kind
    assert completed["attempts"][1]["duration_seconds"] == completed["timings"]["run_seconds"]
    assert completed["timings"]["total_seconds"] >= completed["timings"]["run_seconds"] >= 0


async def test_a_result_is_given_out_as_it_was_stored(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    The result is returned unchanged, even with deep nesting and long integers.
    """
    result = "[" * 500 + "12345678901234567890123" + "]" * 500
    task_id = await submitted(client)
    await settled(db, Settlement(Event.COMPLETE, result=result))
    answer = await client.get(f"/tasks/{task_id}")

    assert 200 == answer.status_code
    assert f'"result":{result}}}' in answer.text
    json.loads(answer.text)


@pytest.mark.parametrize(
    "task_id",
    [
        "x",
        "0",
        "%00",
        "..%2f..%2fetc",
        "{0192f0c1-2b3c-7d4e-8f50-123456789abc}",
        "urn:uuid:0192f0c1-2b3c-7d4e-8f50-123456789abc",
        "0192f0c12b3c7d4e8f50123456789abc",
        "0192f0c1-2b3c-7d4e-8f50-123456789abc%0a",
        "٠192f0c1-2b3c-7d4e-8f50-123456789abc",
    ],
)
async def test_what_is_no_id_is_not_found(offline_client: httpx.AsyncClient, task_id: str) -> None:
    """
    Every operation answers 404; a UUID without dashes, or with anything around it, is not an id.
    """
    assert [404, 404, 404, 404] == await statuses(offline_client, task_id)


async def test_an_unknown_id_is_not_found(client: httpx.AsyncClient) -> None:
    """
    Every operation answers 404.
    """
    assert [404, 404, 404, 404] == await statuses(client, "0192f0c1-2b3c-7d4e-8f50-123456789abc")


async def test_an_id_may_be_in_upper_case(client: httpx.AsyncClient) -> None:
    """
    An id in upper case, as some languages print UUIDs, is accepted; the answer has it in lower
    case.
    """
    task_id = await submitted(client)
    answers = [
        await client.get(f"/tasks/{task_id.upper()}"),
        await client.post(f"/tasks/{task_id.upper()}/cancel"),
        await client.post(f"/tasks/{task_id.upper()}/redrive"),
    ]

    assert [200, 200, 202] == [answer.status_code for answer in answers]
    assert {task_id} == {answer.json()["id"] for answer in answers}


async def statuses(client: httpx.AsyncClient, task_id: str) -> list[int]:
    answers = [
        await client.get(f"/tasks/{task_id}"),
        await client.post(f"/tasks/{task_id}/cancel"),
        await client.post(f"/tasks/{task_id}/redrive"),
        await client.post(f"/tasks/{task_id}/run-now"),
    ]
    return [answer.status_code for answer in answers]


async def test_pages_follow_each_other_without_gaps(client: httpx.AsyncClient) -> None:
    """
    The newest task comes first, and tasks submitted meanwhile do not shift the pages.
    """
    ids = [await submitted(client, payload={"i": i}) for i in range(5)]
    first = (await client.get("/tasks", params={"limit": 2})).json()
    await submitted(client)
    second = (
        await client.get("/tasks", params={"limit": 2, "cursor": first["next_cursor"]})
    ).json()
    third = (
        await client.get("/tasks", params={"limit": 2, "cursor": second["next_cursor"]})
    ).json()

    listed = [task["id"] for page in (first, second, third) for task in page["tasks"]]
    assert ids[::-1] == listed
    assert third["next_cursor"] is None
    assert "payload" not in first["tasks"][0]
    TaskPage.model_validate(first)


async def test_lists_filter_by_status_name_and_queue(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    Every status that users see can be requested, in any case, and filters combine.
    """
    failed = await submitted(client)
    await settled(db, Settlement(Event.FAIL, failure=FAILURE))
    retrying = await submitted(client)
    await settled(db, Settlement(Event.RETRY, delay_seconds=60, failure=FAILURE))
    completed = await submitted(client)
    await settled(db, Settlement(Event.COMPLETE, result="null"))
    running = await submitted(client)
    await claimed_due(db)
    cancelled = await submitted(client)
    await client.post(f"/tasks/{cancelled}/cancel")
    scheduled = await submitted(client, delay_seconds=60)
    pending = await submitted(client, name="y", queue="q")
    queued = await submitted(client)
    await db.execute(
        "UPDATE asyncflow.tasks SET state = 'queued', queued_at = now() WHERE id = $1",
        UUID(queued),
    )

    async def listed(**params: str | list[str]) -> list[str]:
        answer = await client.get("/tasks", params=params)
        return [task["id"] for task in answer.json()["tasks"]]

    assert {
        "PENDING": [pending],
        "SCHEDULED": [scheduled],
        "RETRYING": [retrying],
        "QUEUED": [queued],
        "RUNNING": [running],
        "COMPLETED": [completed],
        "FAILED": [failed],
        "CANCELLED": [cancelled],
    } == {status: await listed(status=status) for status in STATUSES}
    assert await listed(status="FaiLed") == [failed]
    assert await listed(status=["failed", "COMPLETED", "failed"]) == [completed, failed]
    assert await listed(status=["scheduled", "running", "cancelled"]) == [
        scheduled,
        cancelled,
        running,
    ]
    assert await listed(status=["pending", "failed"], name=NAME) == [failed]
    assert len(await listed(status=list(STATUSES))) == len(STATUSES)
    assert await listed(name="y") == await listed(queue="q", status="pending") == [pending]
    assert [] == await listed(name="y", queue="default")


async def test_lists_show_errors_without_tracebacks(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    Lists show an error without its traceback, so a page of dead letters stays readable.
    """
    await submitted(client)
    await settled(db, Settlement(Event.FAIL, failure=FAILURE))
    page = (await client.get("/tasks", params={"status": "FAILED"})).json()

    assert page["tasks"][0]["error"] == {
        "kind": FAILURE.kind,
        "message": FAILURE.message,
        "traceback": None,
    }


def test_the_statuses_of_the_api_are_those_of_the_store() -> None:
    """
    The statuses that can be requested are exactly those that the store can show.
    """
    assert list(STATUSES) == list(STATUS_FILTERS)


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("limit=0", "limit"),
        ("limit=5&limit=5", "limit"),
        ("name=a&name=b", "name"),
        ("queue=a&queue=a", "queue"),
        ("cursor=AAAAAAAAAAAAAAAAAAAAAA&cursor=AAAAAAAAAAAAAAAAAAAAAA", "cursor"),
        ("status=failed&status=done", "status"),
        ("status=failed,completed", "status"),
        ("status[]=failed", "status[]"),
        ("offset=1&offset=2", "offset"),
        ("limit=-1", "limit"),
        ("limit=501", "limit"),
        ("limit=1e9", "limit"),
        ("limit=ten", "limit"),
        ("limit=", "limit"),
        ("status=done", "status"),
        ("status=", "status"),
        ("status=%00", "status"),
        ("name=a%20b", "name"),
        ("name=%27%20OR%201=1", "name"),
        ("queue=%00", "queue"),
        ("queue=", "queue"),
        ("cursor=nonsense", "cursor"),
        ("cursor=%F0%9F%8E%89", "cursor"),
        ("cursor=" + "A" * 22 + "A", "cursor"),
        ("cursor=" + "A" * 1000, "cursor"),
        ("statsu=FAILED", "statsu"),
        ("offset=10", "offset"),
    ],
)
async def test_a_wrong_query_is_refused_by_parameter(
    offline_client: httpx.AsyncClient, query: str, parameter: str
) -> None:
    """
    The answer is 422 and names the parameter; a misspelt filter must not list everything.
    """
    answer = await offline_client.get(f"/tasks?{query}")

    assert 422 == answer.status_code
    assert "/problems/invalid-query" == answer.json()["type"]
    assert [parameter] == [error["parameter"] for error in answer.json()["errors"]]


async def test_a_wrong_status_lists_the_right_ones(offline_client: httpx.AsyncClient) -> None:
    """
    The sentence lists every valid status.
    """
    answer = await offline_client.get("/tasks?status=done")

    assert answer.json()["detail"] == (
        "status must be one of PENDING, SCHEDULED, RETRYING, QUEUED, RUNNING, COMPLETED, "
        "FAILED or CANCELLED."
    )


async def test_a_waiting_task_is_cancelled_immediately(client: httpx.AsyncClient) -> None:
    """
    The answer is 200 with the cancelled task; cancelling it again is a conflict that names its
    state.
    """
    task_id = await submitted(client)
    cancelled = await client.post(f"/tasks/{task_id}/cancel")
    again = await client.post(f"/tasks/{task_id}/cancel")

    assert (200, "CANCELLED") == (cancelled.status_code, cancelled.json()["status"])
    assert "Cancelled" == cancelled.json()["error"]["kind"]
    assert 409 == again.status_code
    assert "/problems/illegal-transition" == again.json()["type"]
    assert "CANCELLED" == again.json()["state"]
    assert again.json()["detail"] == (
        f"Task {task_id} is cancelled; only pending, queued or running tasks can be cancelled."
    )


async def test_a_running_task_is_asked_to_stop(client: httpx.AsyncClient, db: Database) -> None:
    """
    The answer is 202 while its worker has not stopped it yet.
    """
    task_id = await submitted(client)
    await claimed_due(db)
    answer = await client.post(f"/tasks/{task_id}/cancel")

    assert (202, "RUNNING") == (answer.status_code, answer.json()["status"])
    assert answer.json()["cancel_requested_at"] is not None


async def test_a_dead_letter_can_be_redriven(client: httpx.AsyncClient, db: Database) -> None:
    """
    The answer is 202, and the task is pending in a new generation with its history kept. A pending
    task cannot be redriven.
    """
    task_id = await submitted(client)
    await settled(db, Settlement(Event.FAIL, failure=FAILURE))
    redriven = await client.post(f"/tasks/{task_id}/redrive")
    again = await client.post(f"/tasks/{task_id}/redrive")

    view = redriven.json()
    assert 202 == redriven.status_code
    assert ("PENDING", 2, 0) == (view["status"], view["generation"], view["failures"])
    assert ["FAILED"] == [attempt["outcome"] for attempt in view["attempts"]]
    assert (409, "PENDING") == (again.status_code, again.json()["state"])


@pytest.mark.parametrize("status", ["SCHEDULED", "RETRYING"])
async def test_a_task_that_waits_can_be_run_now(
    client: httpx.AsyncClient, db: Database, status: str
) -> None:
    """
    The answer is 202, and the task is due; redriving it is a conflict that names the status shown
    to users.
    """
    task_id = await submitted(client, delay_seconds=0 if status == "RETRYING" else 3600)
    if status == "RETRYING":
        await settled(db, Settlement(Event.RETRY, delay_seconds=3600, failure=FAILURE))
    redriven = await client.post(f"/tasks/{task_id}/redrive")
    answer = await client.post(f"/tasks/{task_id}/run-now")
    again = await client.post(f"/tasks/{task_id}/run-now")
    [claim] = await claimed_due(db)
    late = await client.post(f"/tasks/{task_id}/run-now")

    assert (redriven.status_code, redriven.json()["state"]) == (409, status)
    assert redriven.json()["detail"] == (
        f"Task {task_id} is {status.lower()}; only failed or cancelled tasks can be redriven."
    )
    assert (202, "PENDING") == (answer.status_code, answer.json()["status"])
    assert (again.status_code, again.json()["run_at"]) == (202, answer.json()["run_at"])
    assert task_id == str(claim.task_id)
    assert (409, "RUNNING") == (late.status_code, late.json()["state"])
    assert late.json()["detail"] == (
        f"Task {task_id} is running; only pending or queued tasks can be run now."
    )


async def test_a_task_that_is_run_now_wakes_listeners(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    Listeners are notified, as they are of a submission.
    """
    heard: asyncio.Queue[None] = asyncio.Queue()
    task_id = await submitted(client, delay_seconds=3600)
    async with Listener(db, lambda: heard.put_nowait(None)):
        await asyncio.wait_for(heard.get(), 5)  # The listener is connected now.
        await client.post(f"/tasks/{task_id}/run-now")
        await asyncio.wait_for(heard.get(), 5)
