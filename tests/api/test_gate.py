"""
A foreign page in a user's browser cannot use the API, whatever names and headers it sends; other
clients are unaffected.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from asyncflow.api.front.gate import Gate
from asyncflow.api.problems import KINDS
from asyncflow.errors import Refusal
from asyncflow.processes.api import serve_api
from asyncflow.settings import Settings
from asyncflow.store.database import Database
from tests.support.ports import free_port

TASK_ID = "0192f0c1-2b3c-7d4e-8f50-123456789abc"
JSON = {"Content-Type": "application/json"}

Headers = list[tuple[bytes, bytes]]


def refused(
    gate: Gate, *headers: tuple[bytes, bytes], method: str = "POST", path: str = "/tasks"
) -> str | None:
    """
    The kind of problem with which the gate refuses a request; None if it lets the request through.
    """
    try:
        gate.check({"type": "http", "method": method, "path": path, "headers": headers})
    except Refusal as refusal:
        return refusal.problem_type
    return None


def a_gate(listens_on: str = "127.0.0.1", *, hosts: Any = (), origins: Any = ()) -> Gate:
    return Gate(listens_on=listens_on, hosts=hosts, origins=origins)


LOOPBACK = [
    "localhost",
    "localhost:3000",
    "LOCALHOST:3000",
    "localhost.",
    "localhost.:8080",
    "localhost:",
    "127.0.0.1",
    "127.0.0.1:3000",
    "127.255.0.9:1",
    "[::1]",
    "[::1]:3000",
    "[0:0:0:0:0:0:0:1]:3000",
    "[::ffff:127.0.0.1]",
    "",
]
FOREIGN = [
    "attacker.example",
    "attacker.example:3000",
    "localhost.attacker.example",
    "127.0.0.1.attacker.example",
    "127.0.0.1@attacker.example",
    "attacker.example@localhost",
    "attacker.example,localhost",
    "localhost:3000:3000",
    "localhost:port",
    "localhost/",
    "http://localhost",
    "localhost..",
    " ",
    ".",
    ":",
    ":3000",
    "[",
    "[]",
    "[::1",
    "::1]",
    "[attacker.example]",
    "0x7f.1",
    "127.1",
    "２７.0.0.1",
    "\xffhost",
]


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "::1", "0.0.0.0", "::", "10.0.0.5"])
def test_this_machine_is_always_answered_and_foreign_names_never(listens_on: str) -> None:
    """
    Loopback names are always accepted; a page that rebinds its own name to the server's address is
    refused, whatever address that is.
    """
    gate = a_gate(listens_on)
    hosts = [(b"host", host.encode("utf-8")) for host in [*LOOPBACK, *FOREIGN]]

    kinds = [refused(gate, host) for host in hosts]

    assert [None] * len(LOOPBACK) + ["misdirected"] * len(FOREIGN) == kinds


@pytest.mark.parametrize(
    ("listens_on", "hosts", "host", "expected"),
    [
        ("10.0.0.5", (), "10.0.0.5:3000", None),
        ("10.0.0.5", (), "10.0.0.6", "misdirected"),
        ("127.0.0.1", (), "10.0.0.5", "misdirected"),
        ("127.0.0.1", (), "0.0.0.0:3000", "misdirected"),
        ("tasks.internal", (), "Tasks.Internal:3000", None),
        ("fd00::5", (), "[FD00:0::5]:3000", None),
        ("0.0.0.0", (), "10.0.0.5:3000", None),
        ("0.0.0.0", (), "[fd00::5]", None),
        ("::", (), "10.0.0.5", None),
        ("0.0.0.0", (), "tasks.example.com", "misdirected"),
        ("127.0.0.1", ("tasks.example.com",), "tasks.example.com", None),
        ("127.0.0.1", ("Tasks.Example.com.",), "TASKS.example.COM.:443", None),
        ("127.0.0.1", ("tasks.example.com",), "www.tasks.example.com", "misdirected"),
        ("127.0.0.1", ("10.0.0.5", "[fd00::5]"), "10.0.0.5", None),
        ("127.0.0.1", ("10.0.0.5", "fd00::5"), "[fd00::5]:80", None),
        ("127.0.0.1", ("*",), "attacker.example", None),
    ],
)
def test_a_server_answers_to_where_it_listens_and_to_what_it_is_told(
    listens_on: str, hosts: tuple[str, ...], host: str, expected: str | None
) -> None:
    """
    A server answers to the address it listens on (to any address if it listens on all) and to the
    configured names.
    """
    gate = a_gate(listens_on, hosts=hosts)

    assert expected == refused(gate, (b"host", host.encode()))


def test_one_foreign_host_among_several_is_enough() -> None:
    """
    Their order does not matter. A request without a host, which no browser sends, is accepted.
    """
    gate = a_gate()
    ours, foreign = (b"host", b"localhost"), (b"host", b"attacker.example")

    assert ["misdirected"] * 2 == [refused(gate, ours, foreign), refused(gate, foreign, ours)]
    assert refused(gate) is None


def test_the_cache_of_hosts_is_bounded() -> None:
    """
    The cache of hosts is bounded, so no client can fill the memory with names.
    """
    gate = a_gate()

    for number in range(1_000):
        refused(gate, (b"host", b"host-%d.example" % number))

    assert gate._answers_to.cache_info().currsize <= 64


def origins_and_sites() -> Iterator[tuple[Headers, str | None]]:
    yield [(b"host", b"localhost:3000"), (b"origin", b"http://localhost:3000")], None
    yield [(b"host", b"LocalHost:3000"), (b"origin", b"http://localhost:3000")], None
    yield [(b"host", b"localhost"), (b"origin", b"https://localhost")], None
    yield [(b"host", b"localhost"), (b"origin", b"http://localhost:80")], None
    yield [(b"host", b"localhost"), (b"origin", b"https://app.example.com")], None
    yield [(b"host", b"localhost"), (b"origin", b"HTTPS://App.Example.com")], None
    for origin in (
        b"http://attacker.example",
        b"null",
        b"",
        b"http://localhost:3001",
        b"http://localhost",
        b"http://127.0.0.1:3000",
        b"file://",
        b"localhost:3000",
        b"https://app.example.com.attacker.example",
        b"http://app.example.com",
        b"https://app.example.com:444",
    ):
        yield [(b"host", b"localhost:3000"), (b"origin", origin)], "cross-site"
    yield [(b"host", b""), (b"origin", b"null")], "cross-site"
    yield [(b"origin", b"http://attacker.example")], "cross-site"
    ours = [(b"host", b"localhost"), (b"origin", b"http://localhost")]
    yield [*ours, (b"origin", b"http://attacker.example")], "cross-site"
    # `Sec-Fetch-Site` comes from the browser and holds even if a proxy has changed `Host`.
    behind_proxy = [(b"host", b"127.0.0.1:3000"), (b"origin", b"https://tasks.example.com")]
    yield behind_proxy, "cross-site"
    yield [*behind_proxy, (b"sec-fetch-site", b"same-origin")], None
    yield [*behind_proxy, (b"sec-fetch-site", b"cross-site")], "cross-site"
    host = (b"host", b"localhost")
    yield [host, (b"sec-fetch-site", b"same-origin")], None
    yield [host, (b"sec-fetch-site", b"none")], None
    yield [host, (b"sec-fetch-site", b"same-site")], "cross-site"
    yield [host, (b"sec-fetch-site", b"Cross-Site")], "cross-site"
    yield [host, (b"sec-fetch-site", b"something new")], "cross-site"
    same = (b"sec-fetch-site", b"same-origin")
    yield [host, same, (b"sec-fetch-site", b"cross-site")], "cross-site"
    allowed = (b"origin", b"https://app.example.com")
    yield [host, allowed, (b"sec-fetch-site", b"cross-site")], None


@pytest.mark.parametrize(("headers", "expected"), list(origins_and_sites()))
def test_only_pages_of_this_server_and_of_allowed_origins_change_something(
    headers: Headers, expected: str | None
) -> None:
    """
    Other pages may only read; the browser hides the answers from them.
    """
    gate = a_gate(origins=("https://App.example.com",))

    assert [expected] * 4 == [
        refused(gate, *headers, method=method) for method in ("POST", "PUT", "DELETE", "BREW")
    ]
    assert [None] * 3 == [
        refused(gate, *headers, method=method) for method in ("GET", "HEAD", "OPTIONS")
    ]


def test_every_origin_can_be_allowed() -> None:
    """
    An asterisk allows all origins, for operators who authenticate clients in another way.
    """
    gate = a_gate(origins=("*",))

    assert refused(gate, (b"host", b"localhost"), (b"origin", b"https://any.example")) is None


@pytest.mark.parametrize(
    "keys", [[b"8e03978e"], [b'"8e03978e"'], [b""], [b"a", b"a"], [b"a", b"b"]]
)
def test_idempotency_keys_are_refused_until_they_work(keys: list[bytes]) -> None:
    """
    A client that relied on an ignored key would submit twice. Reads with a key are accepted: they
    are idempotent anyway.
    """
    gate = a_gate()
    headers = [(b"host", b"localhost"), *((b"idempotency-key", key) for key in keys)]

    assert "idempotency-key-unsupported" == refused(gate, *headers)
    assert refused(gate, *headers, method="GET") is None


POSTS = [
    "/tasks",
    "/tasks/batch",
    f"/tasks/{TASK_ID}/cancel",
    f"/tasks/{TASK_ID}/redrive",
    f"/tasks/{TASK_ID}/run-now",
    "/nothing",
]
REFUSED = {
    "misdirected": {"Host": "attacker.example"},
    "cross-site": {"Origin": "http://attacker.example"},
    "idempotency-key-unsupported": {"iDEMPOTENCY-kEY": "8e03978e"},
}


@pytest.mark.parametrize(("path", "kind"), list(product(POSTS, REFUSED)))
async def test_every_path_is_behind_the_gate(
    offline_client: httpx.AsyncClient, path: str, kind: str
) -> None:
    """
    The refusal is a problem document and comes before any database access, which would answer 503
    here.
    """
    answer = await offline_client.post(path, json={"name": "x"}, headers=REFUSED[kind])

    assert (answer.status_code, answer.json()["type"]) == (KINDS[kind].status, f"/problems/{kind}")
    assert "application/problem+json" == answer.headers["content-type"]
    assert "nosniff" == answer.headers["x-content-type-options"]
    assert answer.json()["instance"] == path


async def test_every_route_is_behind_the_gate(
    app: FastAPI, offline_client: httpx.AsyncClient
) -> None:
    """
    Every route refuses foreign hosts, even those that only read: a page that rebinds its name could
    read their answers.
    """
    routes = [
        (method, route.path.replace("{id}", TASK_ID).replace("{kind}", "internal"))  # type: ignore[attr-defined]
        for route in app.routes
        for method in route.methods  # type: ignore[attr-defined]
    ]
    answers = [
        await offline_client.request(method, path, headers=REFUSED["misdirected"])
        for method, path in [*routes, ("OPTIONS", "/tasks")]
    ]

    assert len(routes) > 14
    assert {421} == {answer.status_code for answer in answers}


async def test_a_refusal_says_what_to_set(offline_client: httpx.AsyncClient) -> None:
    """
    The sentence names the setting, for the operator of a new proxy; a long name is truncated.
    """
    misdirected = await offline_client.get("/tasks", headers={"Host": "tasks.example.com:8443"})
    long = await offline_client.get("/tasks", headers={"Host": "x" * 10_000})
    broken = await offline_client.get("/tasks", headers={"Host": "[a/b?c"})
    cross_site = await offline_client.post("/tasks", headers={"Origin": "https://app.example.com"})

    assert misdirected.json()["detail"] == (
        "This server does not answer to the host 'tasks.example.com:8443'. To accept that name, "
        "add it, without a port, to ASYNCFLOW_API_HOSTS."
    )
    assert len(long.content) < 1_000
    assert (421, "/tasks") == (broken.status_code, broken.json()["instance"])
    assert cross_site.json()["detail"] == (
        "The request comes from a page of https://app.example.com; other sites may only read. "
        "To allow an origin, add it to ASYNCFLOW_API_CORS_ORIGINS."
    )


async def test_a_refused_change_changes_nothing(client: httpx.AsyncClient, db: Database) -> None:
    """
    A foreign page can neither submit nor cancel; the same request without its headers can.
    """
    task = (await client.post("/tasks", json={"name": "x"})).json()
    page = {"Origin": "http://attacker.example", "Sec-Fetch-Site": "cross-site"}
    for headers in (page, {"Host": "attacker.example"}, {"Idempotency-Key": "1"}):
        await client.post("/tasks", json={"name": "x"}, headers=headers)
        await client.post("/tasks/batch", json={"tasks": [{"name": "x"}]}, headers=headers)
        await client.post(f"/tasks/{task['id']}/cancel", headers=headers)

    listed = (await client.get("/tasks")).json()["tasks"]
    assert [(task["id"], "PENDING")] == [(one["id"], one["status"]) for one in listed]
    assert 200 == (await client.post(f"/tasks/{task['id']}/cancel")).status_code


FORMS = [
    "text/plain",
    "text/plain;charset=UTF-8",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "",
    "application/jsonp",
]


@pytest.mark.parametrize("act", ["cancel", "redrive", "run-now"])
@pytest.mark.parametrize("content_type", FORMS)
async def test_a_body_that_a_form_could_send_does_not_act(
    offline_client: httpx.AsyncClient, act: str, content_type: str
) -> None:
    """
    The content type of a form is refused before the database is accessed: old browsers do not state
    the origin of a form.
    """

    async def chunks() -> Any:
        yield b"x=y"

    for content in (b"x=y", chunks()):
        answer = await offline_client.post(
            f"/tasks/{TASK_ID}/{act}", content=content, headers={"Content-Type": content_type}
        )

        assert 415 == answer.status_code
        assert answer.json()["detail"] == (
            "This takes no body; remove it, or send JSON with Content-Type: application/json."
        )


@pytest.mark.parametrize("act", ["cancel", "redrive", "run-now"])
@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b"", {}),
        (b"", {"Content-Type": "application/x-www-form-urlencoded"}),
        (b"{}", JSON),
        (b"{}", {"Content-Type": "application/json; version=1"}),
    ],
)
async def test_a_command_needs_no_body(
    offline_client: httpx.AsyncClient, act: str, content: bytes, headers: dict[str, str]
) -> None:
    """
    Commands from `curl -X POST`, `curl -d ''` and client libraries all work.
    """
    answer = await offline_client.post(f"/tasks/{TASK_ID}/{act}", content=content, headers=headers)

    assert 503 == answer.status_code  # The request got as far as the database.


@pytest.mark.parametrize(
    ("listens_on", "expected"),
    [("127.0.0.1", []), ("localhost", []), ("0.0.0.0", ["0.0.0.0"])],
)
async def test_listening_beyond_this_machine_logs_a_warning(
    database_url: str, monkeypatch: pytest.MonkeyPatch, listens_on: str, expected: list[str]
) -> None:
    """
    The warning is logged once, at the start: there is no authentication yet.
    """
    import uvicorn

    async def serve(server: uvicorn.Server, sockets: Any) -> None:
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.2.3")
    # No real socket listens during the test.
    monkeypatch.setattr("socket.socket.listen", lambda *_: None)
    settings = Settings(database_url=database_url, api_host=listens_on, api_port=free_port())

    with capture_logs() as logged:
        await serve_api(settings)

    warned = [line["host"] for line in logged if line["event"] == "api.unprotected"]
    assert expected == warned
