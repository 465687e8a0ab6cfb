"""
An invalid task refuses its batch, or only itself if the batch is `partial`; either way the answer
describes its errors as if it had been sent alone.
"""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from asyncflow.api.catalogue import Catalogue
from asyncflow.jsontext import WALKED_LENGTH_MAX
from asyncflow.store.database import Database
from asyncflow.store.read import get
from asyncflow.store.wakeups import Listener
from asyncflow.store.workers import Published, publish_handlers
from asyncflow.wire.batches import SubmittedBatch

JSON = {"Content-Type": "application/json"}
GOOD = '{"name":"x"}'
EXPIRED = '{"name":"x","expires_at":"2020-01-01T00:00:00Z"}'

WRONG_ROWS: list[tuple[str, str, str]] = [
    (EXPIRED, "invalid-task", "/expires_at"),
    ('{"name":"charge","payload":{}}', "invalid-payload", "/payload/order"),
    ("{}", "invalid-task", "/name"),
    ("3", "invalid-task", ""),
    ("null", "invalid-task", ""),
    ('{"name":"x","priority":10}', "invalid-task", "/priority"),
    ('{"name":"x","prioritty":1}', "invalid-task", "/prioritty"),
    ('{"name":"x","payload":{"x":"%s"}}' % ("y" * 150_000), "invalid-task", "/payload"),
    # Errors that only the strict JSON parser finds.
    ('{"name":"x","payload":{"x":"a\\u0000"}}', "invalid-task", "/payload/x"),
    ('{"name":"x","payload":{"x":"\\ud83c"}}', "invalid-task", "/payload/x"),
    ('{"name":"x","payload":{"x":NaN}}', "invalid-task", "/payload/x"),
    ('{"name":"x","payload":{"x":1e999}}', "invalid-task", "/payload/x"),
    ('{"name":"x","payload":{"x":%s}}' % ("9" * 5_000), "invalid-task", "/payload/x"),
    ('{"name":"x","name":"y"}', "invalid-task", "/name"),
]


@pytest.fixture(autouse=True)
async def charge(db: Database, catalogue: Catalogue) -> None:
    """
    A handler with a typed payload.
    """
    schema = {"type": "object", "required": ["order"]}
    await publish_handlers(db, [Published("charge", "billing", schema)])
    await catalogue.refresh()


def batch(*rows: str, partial: bool = True) -> bytes:
    return f'{{"partial":{json.dumps(partial)},"tasks":[{",".join(rows)}]}}'.encode()


async def posted(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await client.post("/tasks/batch", content=content, headers=JSON)


async def stored(db: Database) -> int:
    count: int = await db.fetchval("SELECT count(*) FROM asyncflow.tasks")
    return count


@pytest.mark.parametrize(("row", "kind", "place"), WRONG_ROWS, ids=lambda value: ascii(value)[:40])
async def test_a_wrong_task_is_told_alike_alone_and_in_a_batch(
    client: httpx.AsyncClient, db: Database, row: str, kind: str, place: str
) -> None:
    """
    In a batch, an invalid task gets the same problem and sentence, at its position. Without
    `partial` it refuses the batch; with it, the other tasks are stored.
    """
    alone = await client.post("/tasks", content=row, headers=JSON)
    whole = await posted(client, batch(GOOD, row, partial=False))
    refused = await stored(db)
    part = await posted(client, batch(GOOD, row, GOOD, row))

    assert (422, 422, 0) == (alone.status_code, whole.status_code, refused)
    assert (207, 2) == (part.status_code, await stored(db))
    told = [alone.json(), whole.json(), *(one["problem"] for one in part.json()["refused"])]
    assert [f"/problems/{kind}"] * 4 == [problem["type"] for problem in told]
    prefixes = ["", "/tasks/1", "/tasks/1", "/tasks/3"]
    assert [prefix + place for prefix in prefixes] == [
        problem["errors"][0]["pointer"] for problem in told
    ]
    assert 1 == len({problem["errors"][0]["detail"] for problem in told})
    assert [1, 3] == [one["index"] for one in part.json()["refused"]]


async def test_the_tasks_of_a_partial_batch_are_answered_at_their_places(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    The position of a refused task holds null; the others are stored as they were sent.
    """
    rows = [
        EXPIRED,
        '{"name":"a","payload":{"i":9007199254740993}}',
        '{"name":"b","payload":{"x":NaN}}',
        '{"name":"c","payload":{"x":1.50}}',
        "[]",
    ]
    answer = await posted(client, batch(*rows))

    view = SubmittedBatch.model_validate_json(answer.content)
    assert [None, "a", None, "c", None] == [task and task.name for task in view.tasks]
    assert [0, 2, 4] == [one.index for one in view.refused]
    assert {"/tasks/batch"} == {one.problem.instance for one in view.refused}
    payloads = [(await get(db, 1, task.id)).payload for task in view.tasks if task]
    assert ['{"i":9007199254740993}', '{"x":1.5}'] == payloads


async def test_a_partial_batch_without_a_fault_is_stored_as_any_other(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    The answer is 202 without refused tasks, as it is without `partial`.
    """
    answers = [
        await posted(client, batch(GOOD, GOOD, partial=partial)) for partial in (True, False)
    ]

    assert [202, 202] == [answer.status_code for answer in answers]
    assert [[], []] == [answer.json()["refused"] for answer in answers]
    assert 4 == await stored(db)


async def test_a_partial_batch_of_wrong_tasks_only_stores_nothing(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    The answer is that of any other partial batch, so clients need no special case.
    """
    answer = await posted(client, batch(EXPIRED, "{}"))

    assert 207 == answer.status_code
    assert [None, None] == answer.json()["tasks"]
    assert [0, 1] == [one["index"] for one in answer.json()["refused"]]
    assert 0 == await stored(db)


@pytest.mark.parametrize(
    ("content", "pointer"),
    [
        (b'{"partial":true,"tasks":[]}', "/tasks"),
        (b'{"partial":true,"tasks":{}}', "/tasks"),
        (b'{"partial":true}', "/tasks"),
        (b'{"partial":true,"tasks":[{}],"all":1}', "/all"),
        (b'{"partial":true,"tasks":[{}],"partial":true}', "/partial"),
        (
            b'{"partial":true,"tasks":[{"name":"x","payload":{"x":NaN}}],"x":NaN}',
            "/tasks/0/payload/x",
        ),
        (b'{"partial":"yes","tasks":[{"name":"x"}]}', "/partial"),
        (b'{"partial":1,"tasks":[{"name":"x"}]}', "/partial"),
        (b'{"partial":null,"tasks":[{"name":"x"}]}', "/partial"),
        (b'{"partial":true,"tasks":[%b{"name":"x"}]}' % (b'{"name":"x"},' * 1000), "/tasks"),
        (b'{"partial":true,"tasks":[%b{}]}' % (b"[" * 70 + b"]" * 70 + b","), ""),
    ],
    ids=lambda value: ascii(value)[:60],
)
async def test_what_is_wrong_with_a_batch_itself_refuses_it_as_a_whole(
    client: httpx.AsyncClient, db: Database, content: bytes, pointer: str
) -> None:
    """
    `partial` tolerates invalid tasks only, not an invalid batch.
    """
    answer = await posted(client, content)

    assert 422 == answer.status_code
    assert pointer in [error["pointer"] for error in answer.json()["errors"]]
    assert 0 == await stored(db)


@pytest.mark.parametrize("body_bytes_max", [2 * WALKED_LENGTH_MAX])
async def test_a_large_batch_with_odd_json_is_refused_as_a_whole(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    Locating the errors would take seconds, during which no other client is served.
    """
    blanks = " " * WALKED_LENGTH_MAX
    answer = await posted(client, batch(GOOD, '{"name":"x","payload":{"x":NaN}}' + blanks))

    assert 422 == answer.status_code
    assert "" == answer.json()["errors"][0]["pointer"]
    assert 0 == await stored(db)


async def test_a_batch_with_faults_of_both_kinds_is_an_invalid_task(
    client: httpx.AsyncClient,
) -> None:
    """
    The problem is `invalid-task`, because `invalid-payload` would say that nothing else is wrong.
    """
    charge = '{"name":"charge","payload":{}}'
    payloads = await posted(client, batch(charge, charge, partial=False))
    both = await posted(client, batch(charge, EXPIRED, partial=False))

    assert "/problems/invalid-payload" == payloads.json()["type"]
    assert "/problems/invalid-task" == both.json()["type"]
    assert (
        "/tasks/0/payload/order is required. (One of 2 errors; see `errors`.)"
        == (both.json()["detail"])
    )


@pytest.mark.parametrize(
    "row", ["{}", EXPIRED, '{"name":"charge"}', '{"name":"x","payload":{"x":NaN}}']
)
async def test_a_refusal_says_how_many_faults_there_are(
    client: httpx.AsyncClient, row: str
) -> None:
    """
    The total is correct whichever check found the errors; the first twenty are listed.
    """
    answer = await posted(client, batch(*[row] * 321, partial=False))

    assert answer.json()["detail"].endswith(" (One of 321 errors; the first 20 are in `errors`.)")
    assert 20 == len(answer.json()["errors"])


async def test_a_task_of_a_partial_batch_says_how_many_faults_it_has(
    client: httpx.AsyncClient,
) -> None:
    """
    Each refused task states its total but lists fewer errors: a thousand tasks with twenty each
    would be megabytes.
    """
    unknown = ",".join(f'"k{number}":1' for number in range(30))
    odd = ",".join(f'"k{number}":NaN' for number in range(30))
    rows = [f'{{"name":"x",{unknown}}}', f'{{"name":"x","payload":{{{odd}}}}}']
    answer = await posted(client, batch(*rows))

    for refused in answer.json()["refused"]:
        assert 5 == len(refused["problem"]["errors"])
        assert "(One of 30 errors; the first 5 are in `errors`.)" in refused["problem"]["detail"]


async def test_a_partial_batch_wakes_listeners_for_what_it_stored(
    client: httpx.AsyncClient, db: Database
) -> None:
    """
    Listeners are woken for the stored tasks, and not for the refused ones.
    """
    heard: asyncio.Queue[None] = asyncio.Queue()
    async with Listener(db, lambda: heard.put_nowait(None)):
        await asyncio.wait_for(heard.get(), 5)  # The listener is connected now.
        await posted(client, batch(EXPIRED, '{"name":"x","delay_seconds":60}'))
        silent = heard.empty()
        await posted(client, batch(EXPIRED, GOOD))
        await asyncio.wait_for(heard.get(), 5)

    assert silent
