"""
Raw requests: each request gets one answer, never a server error, and no body is ever run as a
request.

They are sent to a live API over a socket, and directly to the protocol class, where every way to
split them into packets can be tried.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from asyncflow.api.front.protocol import BoundedProtocol
from tests.api.raw_requests import Sent, cancelling, corpus, get, length, post
from tests.support.live import PATIENCE_SECONDS, LiveApi, live_api
from tests.support.postgres import PostgresServer

NOBODY = "00000000-0000-7000-8000-000000000000"
WHATS = [sent.what for sent in corpus(cancelling(NOBODY))]
PROBE = b"GET /probe HTTP/1.1\r\nHost: api\r\nConnection: close\r\n\r\n"


class Answer(NamedTuple):
    """
    One answer, as read by a client that trusts the stated lengths.
    """

    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def problem(self) -> str:
        """
        The problem type; empty if the answer is not a problem.
        """
        if self.headers.get("content-type") != "application/problem+json":
            return ""
        return str(json.loads(self.content)["type"])


def answers_in(received: bytes, *, with_bodies: bool = True) -> Iterator[Answer]:
    """
    Parse a server's answers; skip interim ones (1xx).
    """
    while received:
        head, end, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert end and version == "HTTP/1.1"
        headers = {name.lower(): value for name, value in (x.split(": ", 1) for x in lines)}
        assert "transfer-encoding" not in headers
        size = int(headers.get("content-length", 0)) if with_bodies else 0
        assert size <= len(received)
        if status != "100":
            yield Answer(int(status), headers, received[:size])
        received = received[size:]


class Watched(NamedTuple):
    """
    A live API, and a task that no request may cancel.
    """

    api: LiveApi
    task_id: str
    corpus: dict[str, Sent]


@pytest.fixture(scope="module")
def watched(
    postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """
    One API for the whole corpus; it must exit without having logged an error.
    """
    database_url = postgres_server.create_database()
    with live_api(database_url, tmp_path_factory.mktemp("raw")) as api:
        task_id = api.send("POST", "/tasks", b'{"name":"canary"}').json["id"]
        sents = corpus(cancelling(task_id))
        yield Watched(api, task_id, {sent.what: sent for sent in sents})
        assert not api.noise
    postgres_server.drop_database(database_url)


def test_the_corpus_is_large_and_says_each_thing_once() -> None:
    """
    Every entry has a name and bytes of its own.
    """
    sents = list(corpus(cancelling(NOBODY)))

    assert len(sents) >= 200
    assert len(sents) == len({sent.what for sent in sents})
    assert len(sents) == len({(sent.bytes, sent.leaves) for sent in sents})
    assert sum(cancelling(NOBODY) in sent.bytes for sent in sents) >= 200


@pytest.mark.parametrize("what", WHATS, ids=lambda what: ascii(what)[1:-1])
def test_every_request_gets_one_answer_and_no_body_is_run(watched: Watched, what: str) -> None:
    """
    Each entry is followed by a probe, which is only answered correctly if the entry was read
    correctly.
    """
    sent = watched.corpus[what]

    received = watched.api.exchange(
        sent.bytes if sent.leaves else sent.bytes + PROBE, then_close=sent.leaves
    )

    answers = list(answers_in(received))
    if sent.stays:
        probed = answers.pop()
        assert (404, "/probe") == (probed.status, json.loads(probed.content)["instance"])
    assert list(sent.answers) == [answer.status for answer in answers], received
    for answer in answers:
        assert (answer.status >= 400) == answer.problem.startswith("/problems/")
        assert "no-store" == answer.headers["cache-control"]
    assert "PENDING" == watched.api.send("GET", f"/tasks/{watched.task_id}").json["status"]


@pytest.mark.parametrize("method", [b"HEAD", b"head"])
def test_head_is_answered_without_a_body_and_its_own_body_is_read(
    watched: Watched, method: bytes
) -> None:
    """
    A body sent with HEAD is read as a body, even if the parser refuses the request before it knows
    the method.
    """
    canary = cancelling(watched.task_id)

    received = watched.api.exchange(
        get(length(canary), b"Connection: close\r\n", method=method, body=canary)
    )

    (answer,) = answers_in(received, with_bodies=method != b"HEAD")
    assert answer.status == (200 if method == b"HEAD" else 400)
    assert "PENDING" == watched.api.send("GET", f"/tasks/{watched.task_id}").json["status"]


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.2"])
def test_an_offer_to_upgrade_is_ignored_when_the_body_comes_later(
    watched: Watched, offer: bytes
) -> None:
    """
    The API has read only the head: it asks for the body, as the client expects.
    """
    body = cancelling(watched.task_id)
    head = post(
        b"Connection: Upgrade, close\r\nUpgrade: %b\r\nExpect: 100-continue\r\n" % offer,
        length(body),
        body=b"",
    )

    address = ("127.0.0.1", watched.api.port)
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(head)
        asked = connection.recv(1_000)
        connection.sendall(body)
        with connection.makefile("rb") as rest:
            (answer,) = answers_in(rest.read())

    assert b"HTTP/1.1 100 Continue\r\n\r\n" == asked
    assert (400, "/problems/malformed-json") == (answer.status, answer.problem)
    assert "PENDING" == watched.api.send("GET", f"/tasks/{watched.task_id}").json["status"]


class Far(asyncio.Transport):
    """
    The far side of one connection, in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """
        Record a piece of an answer.
        """
        self.received += data

    def is_closing(self) -> bool:
        """
        Whether the server has closed the connection.
        """
        return self.closed

    def close(self) -> None:
        """
        Record that the server closed the connection.
        """
        self.closed = True

    def write_eof(self) -> None:
        """
        Record that the server sends nothing more.
        """
        self.closed = True

    def get_write_buffer_size(self) -> int:
        """
        Zero: everything is read immediately.
        """
        return 0

    def pause_reading(self) -> None:
        """
        Do nothing: the test delivers the data itself.
        """

    resume_reading = pause_reading


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """
    Answer a request with a dump of its contents.
    """
    body = b""
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message.get("body", b"")
        more = message.get("more_body", False)
    told = repr((scope["method"], scope["raw_path"], scope["headers"], body)).encode()
    headers = [(b"content-length", b"%d" % len(told))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": told})


ECHOING = uvicorn.Config(echo, ws="none", lifespan="off", log_config=None)
# One offer is enough: they differ only in the protocol's name.
SHORT = [
    sent
    for sent in corpus(b"POST /c HTTP/1.1\r\n\r\n")
    if len(sent.bytes) < 150 and not re.match("upgrade (?!h2c,)", sent.what)
]


async def answered(*packets: bytes) -> tuple[bytes, bool]:
    """
    Everything that the client of one connection receives, and whether the server closed it.
    """
    state, far = ServerState(), Far()
    protocol = BoundedProtocol(ECHOING, state, {})
    protocol.connection_made(far)
    for packet in packets:
        protocol.data_received(packet)
    unchanged, seen = 0, far.received
    while state.tasks and unchanged < 10:  # A truncated body never completes.
        await asyncio.sleep(0)
        unchanged, seen = (unchanged + 1 if seen == far.received else 0), far.received
    await asyncio.sleep(0)  # The turn in which the last answer is sent.
    closed = far.closed
    protocol.connection_lost(ConnectionResetError())
    await asyncio.gather(*state.tasks)
    return far.received, closed


async def test_packets_make_no_difference() -> None:
    """
    The application sees the same requests if the bytes are split anywhere, or sent one by one.
    """
    for sent in SHORT:
        whole = await answered(sent.bytes)
        for at in range(1, len(sent.bytes)):
            assert whole == await answered(sent.bytes[:at], sent.bytes[at:]), (sent.what, at)
        assert whole == await answered(*[bytes([byte]) for byte in sent.bytes]), sent.what
