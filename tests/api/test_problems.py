"""
Errors as problem documents, and requests that break the rules of HTTP itself.
"""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from asyncflow.api.body import _check_type
from asyncflow.api.problems import KINDS
from asyncflow.errors import Refusal
from asyncflow.settings import Settings
from asyncflow.store.database import Database
from asyncflow.wire.problems import Problem

GOOD = b'{"name":"x"}'


def assert_problem(answer: httpx.Response, kind: str) -> Problem:
    assert "application/problem+json" == answer.headers["content-type"]
    problem = Problem.model_validate_json(answer.content)
    assert problem.type == f"/problems/{kind}"
    assert (problem.status, problem.title) == (answer.status_code, KINDS[kind].title)
    assert (answer.status_code, problem.instance) == (KINDS[kind].status, answer.url.path)
    assert problem.detail.endswith((".", "?"))
    return problem


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (GOOD, "application/json"),
        (GOOD, "text/plain"),
        (b'{"name":', "application/json"),
        (b'{"nmae":"x"}', "application/json"),
        (b'{"name":"refused"}', "application/json"),
        (b" " * 1_000_000, "application/json"),
    ],
    ids=["good", "type", "malformed", "wrong", "fault", "large"],
)
async def test_a_submission_is_answered_alike_with_and_without_fastapi(
    app: FastAPI, client: httpx.AsyncClient, db: Database, content: bytes, content_type: str
) -> None:
    """
    `POST /tasks` is served directly; without that shortcut FastAPI's route gives the same answer.
    """
    await db.execute("ALTER TABLE asyncflow.tasks ADD CHECK (name <> 'refused')")
    headers = {"Content-Type": content_type}
    direct = await client.post("/tasks", content=content, headers=headers)
    app.direct.clear()  # type: ignore[attr-defined]
    routed = await client.post("/tasks", content=content, headers=headers)

    assert _without_what_differs(direct) == _without_what_differs(routed)


def _without_what_differs(answer: httpx.Response) -> tuple[int, dict[str, str], dict[str, Any]]:
    headers, members = dict(answer.headers), answer.json()
    for name in ("location", "content-length"):
        headers.pop(name, None)
    for name in ("id", "created_at", "run_at", "instance", "incident_id", "detail"):
        members.pop(name, None)
    return answer.status_code, headers, members


async def test_a_submission_does_not_pass_through_fastapi(
    app: FastAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A submission bypasses FastAPI's router, which would double its cost.
    """
    monkeypatch.setattr(app.router, "middleware_stack", None)

    answer = await client.post("/tasks", content=GOOD, headers={"Content-Type": "application/json"})
    routed = await client.get("/tasks")

    assert (202, 500) == (answer.status_code, routed.status_code)


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonp",
        "application/json; charset=latin-1",
        "application/json; charset=utf-16",
        "application/json, text/plain",
        "application/json; version",
        "application/json; version=1 2",
        'application/json; version="1',
        "application/json; charset=utf-8; charset=latin-1",
        'application/json; version=1; Charset="ISO-8859-1"',
        "application/json; charset=us-ascii",
        "json",
    ],
)
async def test_only_json_in_utf_8_is_read(
    offline_client: httpx.AsyncClient, content_type: str
) -> None:
    """
    The answer is 415 and names the header that would be accepted.
    """
    answer = await offline_client.post(
        "/tasks", content=GOOD, headers={"Content-Type": content_type}
    )

    problem = assert_problem(answer, "unsupported-media-type")
    assert "Content-Type: application/json" in problem.detail


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json; version=1",
        'application/json ; version="1; charset=latin-1" ;charset=utf-8; x=y',
        "application/json;",
        "application/vnd.example+json",
    ],
)
async def test_every_way_to_say_json_is_understood(
    offline_client: httpx.AsyncClient, content_type: str
) -> None:
    """
    Every spelling of the JSON content type gets as far as the database, which is unreachable here.
    """
    answer = await offline_client.post(
        "/tasks", content=GOOD, headers={"Content-Type": content_type}
    )

    assert_problem(answer, "unavailable")


async def test_another_charset_is_named_as_what_is_wrong(
    offline_client: httpx.AsyncClient,
) -> None:
    """
    The sentence names the charset, because the rest of the header was correct.
    """
    answer = await offline_client.post(
        "/tasks", content=GOOD, headers={"Content-Type": "application/json; charset=utf-16"}
    )

    assert answer.json()["detail"] == (
        "The body must be JSON in UTF-8, and the charset says otherwise; send it with "
        "Content-Type: application/json."
    )


def test_a_content_type_without_end_is_refused_in_no_time() -> None:
    """
    The header is parsed in linear time; a backtracking pattern would exceed the test's timeout.
    """
    headers = {b"content-type": b"application/json" + b" ; \t" * 20_000 + b"x"}

    with pytest.raises(Refusal):
        _check_type(headers)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
async def test_compressed_bodies_are_refused(
    offline_client: httpx.AsyncClient, encoding: str
) -> None:
    """
    The answer is 415 and nothing is decompressed, so a compression bomb is harmless.
    """
    answer = await offline_client.post(
        "/tasks",
        content=gzip.compress(GOOD),
        headers={"Content-Type": "application/json", "Content-Encoding": encoding},
    )

    assert_problem(answer, "unsupported-media-type")


@pytest.mark.parametrize("path", ["/tasks", "/tasks/batch"])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
async def test_a_body_beyond_the_limit_is_refused(
    offline_client: httpx.AsyncClient, settings: Settings, path: str, declared: bool
) -> None:
    """
    The answer is 413, with or without a Content-Length, and the connection is closed.
    """
    body = b'{"name":"x","payload":{"x":"%s"}}' % (b"y" * settings.api_body_bytes_max)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    answer = await offline_client.post(
        path,
        content=body if declared else chunks(),
        headers={"Content-Type": "application/json"},
    )

    problem = assert_problem(answer, "body-too-large")
    assert f"at most {settings.api_body_bytes_max} bytes" in problem.detail
    assert "close" == answer.headers["connection"]


@pytest.mark.parametrize("path", ["/nothing", "/tasks/", "/Tasks", "/tasks/x/y", "/%00"])
async def test_an_unknown_path_is_a_problem(offline_client: httpx.AsyncClient, path: str) -> None:
    """
    The answer is 404, with no redirect to a similar path.
    """
    answer = await offline_client.get(path)

    assert 404 == answer.status_code
    assert "/problems/not-found" == answer.json()["type"]


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("/tasks/", "/tasks"),
        ("/tasks/batch/", "/tasks/batch"),
        ("//tasks", "/tasks"),
        ("/Tasks", "/tasks"),
        ("/health/ready/", "/health/ready"),
        ("/docs/", "/docs"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_path_that_is_nearly_right_is_hinted_at(
    offline_client: httpx.AsyncClient, method: str, path: str, hint: str
) -> None:
    """
    The answer names the right path but does not redirect: clients would follow with a GET, and a
    submission would list tasks.
    """
    answer = await offline_client.request(method, f"http://api{path}")

    problem = assert_problem(answer, "not-found")
    assert problem.detail == f"There is nothing at {path}; did you mean {hint}?"


async def test_an_unknown_path_gets_no_hint(offline_client: httpx.AsyncClient) -> None:
    """
    A path that resembles no other gets no hint, which is better than a wrong one.
    """
    answer = await offline_client.get("/nothing/")

    assert "There is nothing at /nothing/." == answer.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/tasks", "GET, HEAD, OPTIONS, POST"),
        ("DELETE", "/tasks/0192f0c1-2b3c-7d4e-8f50-123456789abc", "GET, HEAD, OPTIONS"),
        ("GET", "/tasks/x/cancel", "OPTIONS, POST"),
        ("PUT", "/tasks/batch", "OPTIONS, POST"),
        ("GET", "/tasks/batch", "OPTIONS, POST"),
        ("POST", "/health/live", "GET, HEAD, OPTIONS"),
        ("TRACE", "/docs", "GET, HEAD, OPTIONS"),
        ("BREW", "/tasks", "GET, HEAD, OPTIONS, POST"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(
    offline_client: httpx.AsyncClient, method: str, path: str, allow: str
) -> None:
    """
    The answer is 405 with every method of the path, not only the first route's; OPTIONS lists
    the same.
    """
    answer = await offline_client.request(method, path)
    options = await offline_client.options(path)

    assert_problem(answer, "method-not-allowed")
    assert (204, b"") == (options.status_code, options.content)
    assert allow == answer.headers["allow"] == options.headers["allow"]


async def test_head_is_answered_like_get(offline_client: httpx.AsyncClient) -> None:
    """
    Probes that send HEAD get the status of GET.
    """
    assert 200 == (await offline_client.head("/health/live")).status_code
    assert 503 == (await offline_client.head("/health/ready")).status_code
    assert 200 == (await offline_client.head("/docs")).status_code
    assert 405 == (await offline_client.head("/tasks/x/cancel")).status_code


async def test_an_internal_error_shows_only_its_incident(
    app: FastAPI, client: httpx.AsyncClient
) -> None:
    """
    The answer is 500 with an id that is also in the log line, and without traceback or message.
    """

    async def broken() -> None:
        raise RuntimeError("the secret is sesame")

    app.add_api_route("/broken", broken)
    with capture_logs() as logged:
        answer = await client.get("/broken")

    problem = assert_problem(answer, "internal")
    assert "sesame" not in answer.text
    assert problem.incident_id is not None
    assert problem.incident_id in problem.detail
    assert [(problem.incident_id, "GET", "/broken")] == [
        (line["incident_id"], line["method"], line["path"])
        for line in logged
        if line["event"] == "request.failed"
    ]


async def test_every_answer_keeps_browsers_from_guessing_and_caching(
    offline_client: httpx.AsyncClient,
) -> None:
    """
    Successful answers, problems and pages all have the headers; CORS is off.
    """
    origin = {"Origin": "http://evil.example"}
    for path in ("/health/live", "/health/ready", "/nothing", "/docs", "/openapi.json"):
        answer = await offline_client.get(path, headers=origin)

        assert "nosniff" == answer.headers["x-content-type-options"]
        assert "no-store" == answer.headers["cache-control"]
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_type_of_a_problem_can_be_opened(
    offline_client: httpx.AsyncClient, kind: str
) -> None:
    """
    The URI of a problem type leads to its description.
    """
    answer = await offline_client.get(f"/problems/{kind}")

    assert 200 == answer.status_code
    assert KINDS[kind].meaning in answer.text


async def test_an_unknown_problem_type_lists_the_known_ones(
    offline_client: httpx.AsyncClient,
) -> None:
    """
    The answer is 404 with the list.
    """
    answer = await offline_client.get("/problems/nothing")

    assert 404 == answer.status_code
    assert "illegal-transition" in answer.json()["detail"]


async def test_what_a_problem_quotes_is_cut(offline_client: httpx.AsyncClient) -> None:
    """
    A quoted key of 100 kB is truncated.
    """
    answer = await offline_client.post("/tasks", json={"name": "x", "k" * 100_000: 1})

    assert 422 == answer.status_code
    assert len(answer.content) < 3_000
