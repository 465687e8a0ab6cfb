"""
Bodies, content types and ids that no client library would send, against a live API: each is refused
as a client error, or accepted and returned unchanged; none causes a server error. Oddities of HTTP
itself are in `raw_requests`.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import asyncpg
import pytest

from asyncflow.api.problems import KINDS
from asyncflow.wire.problems import Problem
from tests.api.torture import Body, corpus
from tests.support.live import JSON, Answer, LiveApi, live_api
from tests.support.postgres import PostgresServer

BODIES = list(corpus())


class Counting:
    """
    A live API, with a count of the tasks that it accepted.
    """

    def __init__(self, api: LiveApi) -> None:
        self.api = api
        self.accepted = 0

    def post(self, path: str, text: bytes, headers: dict[str, str] = JSON) -> Answer:
        """
        Submit, and count what is accepted.
        """
        answer = self.api.send("POST", path, text, headers)
        if answer.status == 202:
            self.accepted += len(answer.json.get("tasks", [answer.json]))
        return answer


@pytest.fixture(scope="module")
def counting(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Counting]:
    """
    One API for all bodies. At the end, rows and 202s must match one to one, and all tasks can be
    listed.
    """
    database_url = postgres_server.create_database()
    with live_api(database_url, tmp_path_factory.mktemp("torture")) as api:
        counting = Counting(api)
        yield counting
        assert counting.accepted == asyncio.run(stored(database_url)) == listed(api)
    postgres_server.drop_database(database_url)


def listed(api: LiveApi) -> int:
    """
    How many tasks the API lists.
    """
    count, cursor = 0, ""
    while True:
        page = api.send("GET", f"/tasks?limit=500{cursor}").json
        count += len(page["tasks"])
        if page["next_cursor"] is None:
            return count
        cursor = f"&cursor={page['next_cursor']}"


async def stored(database_url: str) -> int:
    """
    How many tasks the database holds.
    """
    connection = await asyncpg.connect(database_url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM asyncflow.tasks"))
    finally:
        await connection.close()


def test_the_corpus_is_large_and_says_each_thing_once() -> None:
    """
    There are about 400 bodies, accepted and refused ones, each with a unique name.
    """
    assert len(BODIES) >= 300
    assert len(BODIES) == len({body.what for body in BODIES})
    assert len(BODIES) == len({body.text for body in BODIES})
    assert 50 <= sum(body.kind is None for body in BODIES) <= len(BODIES) - 150


@pytest.mark.parametrize("body", BODIES, ids=lambda body: ascii(body.what)[1:-1])
def test_a_tortured_body_is_refused_with_its_fact_or_read_back_as_it_was(
    counting: Counting, body: Body
) -> None:
    """
    Each body is sent alone and as the second task of a batch.
    """
    alone = counting.post("/tasks", body.text)
    batch = b'{"tasks":[{"name":"first"},' + body.text + b"]}"
    batched = counting.post("/tasks/batch", batch)

    if body.kind is None:
        assert (202, 202) == (alone.status, batched.status), (alone.content, batched.content)
        sent = json.loads(body.text).get("payload", {})
        for task_id in (alone.json["id"], batched.json["tasks"][1]["id"]):
            read = counting.api.send("GET", f"/tasks/{task_id}").json["payload"]
            assert json.dumps(sent) == json.dumps(read)
    else:
        for answer, path in ((alone, "/tasks"), (batched, "/tasks/batch")):
            assert re.search(body.fact, told_by(answer, body.kind, path)), answer.content


def told_by(answer: Answer, kind: str, path: str) -> str:
    """
    Every sentence of a problem document; fails unless the answer is the expected problem.
    """
    assert "application/problem+json" == answer.headers["content-type"], answer
    problem = Problem.model_validate_json(answer.content)
    expected = (f"/problems/{kind}", KINDS[kind].status, KINDS[kind].title, path)
    assert expected == (problem.type, problem.status, problem.title, problem.instance)
    assert answer.status == problem.status
    faults = [f"{fault.pointer} {fault.detail}" for fault in problem.errors or ()]
    return "\n".join([problem.detail, *faults])


@pytest.mark.parametrize(
    ("content_type", "is_read"),
    [
        ("APPLICATION/JSON;CHARSET=UTF8", True),
        ("application/json ; charset=utf-8 ", True),
        ("application/problem+json", True),
        ("application/json;charset=us-ascii", False),
        ("application/json; charset=utf-7", False),
        ("application/json; charset=utf-8; charset=utf-16", False),
        ("application/json; charset=", False),
        ("application/json; boundary=x", True),
        ("application/json\t; charset=utf-8, text/html", False),
        ("application/json5", False),
        ("application/json-seq", False),
        ("application/x-json", False),
        ("application/x-ndjson", False),
        ("text/json", False),
        ("*/*", False),
        ("application/*", False),
        ("application/", False),
        ("/json", False),
        ("application/json/x", False),
        ("application\\json", False),
        ("äpplication/json", False),
        ("application/" + "a" * 30_000 + "!json", False),
        ("application/json;" + " " * 30_000 + "x", False),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_a_content_type_says_json_or_is_refused(
    counting: Counting, content_type: str, is_read: bool
) -> None:
    """
    The content type is never guessed, and no value takes long to parse.
    """
    answer = counting.post("/tasks", b'{"name":"x"}', {"Content-Type": content_type})

    if is_read:
        assert 202 == answer.status
    else:
        assert "Content-Type: application/json" in told_by(
            answer, "unsupported-media-type", "/tasks"
        )


@pytest.mark.parametrize(
    "task_id",
    [
        "0192f0c1-2b3c-7d4e-8f50-123456789ab",
        "0192f0c1-2b3c-7d4e-8f50-123456789abcd",
        "0192f0c1-2b3c-7d4e-8f50-123456789abg",
        "0192f0c1-2b3c-7d4e-8f501-23456789abc",
        "0192f0c12b3c-7d4e-8f50-123456789abc",
        "0192F0C1-2b3c-7d4e-8f50-123456789abc",
        "0192f0c1-2b3c-7d4e-8f50-123456789abc%20",
        "%200192f0c1-2b3c-7d4e-8f50-123456789abc",
        "0192f0c1-2b3c-7d4e-8f50-123456789abc%00",
        "0192f0c1%E2%80%932b3c%E2%80%937d4e%E2%80%938f50%E2%80%93123456789abc",
        "%EF%BC%90192f0c1-2b3c-7d4e-8f50-123456789abc",
        "%FF%FE",
        "%ED%A0%80",
        "%",
        "%zz",
        "null",
        "-1",
        "0192f0c1-2b3c-7d4e-8f50-123456789abc;DROP",
        "00000000-0000-0000-0000-000000000000",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
        "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        "a" * 20_000,
    ],
    ids=lambda task_id: task_id[:40],
)
def test_what_is_nearly_an_id_is_not_found(counting: Counting, task_id: str) -> None:
    """
    Every operation answers 404 to such an id, sent exactly as it is.
    """
    answers = [
        counting.api.send("GET", f"/tasks/{task_id}"),
        counting.api.send("POST", f"/tasks/{task_id}/cancel"),
        counting.api.send("POST", f"/tasks/{task_id}/redrive"),
        counting.api.send("POST", f"/tasks/{task_id}/run-now"),
    ]

    for answer in answers:
        problem: Any = answer.json
        assert (404, "/problems/task-not-found") == (answer.status, problem["type"]), problem
