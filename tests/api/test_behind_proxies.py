"""
Common proxies in front of the API: each request that the proxy sees gets one answer, sent to the
client that made it, and no request runs that the proxy did not see.

Proxies refuse much of the corpus and read some of it differently than the API would. The API must
read what they forward as they meant it: proxies reuse connections, so otherwise another client
would get the wrong answer.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.api.raw_requests import cancelling, corpus, length, post
from tests.api.test_raw_requests import NOBODY, PROBE, Answer
from tests.support.live import PATIENCE_SECONDS, LiveApi, live_api
from tests.support.proxies import PACKAGES, Proxy, running_proxy

# One offer is enough: they differ only in the protocol's name.
WHATS = [
    sent.what
    for sent in corpus(cancelling(NOBODY))
    if not re.match("upgrade (?!h2c,|websocket,)", sent.what)
]
WITHOUT_STATUS = 0
BROKEN_OFF = {400, 408, 499}
"""What a proxy logs when a request ended too early to be answered."""


pytestmark = pytest.mark.timeout(600)  # Catches a hang; generous enough for a slow machine.


class Exchanged(NamedTuple):
    """
    The outcome of one entry of the corpus.
    """

    what: str
    address: str
    answers: list[Answer]
    probed: Answer
    cancelled: str


@pytest.fixture
def api(database_url: str, tmp_path: Path) -> Iterator[LiveApi]:
    """
    An API behind a proxy.
    """
    with live_api(database_url, tmp_path) as api:
        yield api


@pytest.fixture(params=PACKAGES)
def web_proxy(api: LiveApi, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """
    The proxy.
    """
    with running_proxy(request.param, api_port=api.port) as proxy:
        yield proxy


@pytest.mark.skipif(sys.platform != "linux", reason="clients need addresses of their own")
def test_a_proxy_and_the_api_read_the_same_requests(web_proxy: Proxy, api: LiveApi) -> None:
    """
    Each entry is sent from its own address; then another client's request must get its own answer.
    """
    exchanged = list(_exchange_all(web_proxy, api))
    logged = web_proxy.logged()

    for what, address, answers, probed, cancelled in exchanged:
        statuses = [answer.status for answer in answers]
        seen = logged.get(address, [])
        told = [request.status for request in seen]
        if len(told) > len(statuses) and told[-1] in BROKEN_OFF:
            told.pop()
        if WITHOUT_STATUS in statuses:
            statuses = told[: len(statuses)]
        assert told == statuses, what
        assert not {500, 502, 503, 504} & {*statuses}, (what, answers)
        assert (404, "/probe") == (probed.status, json.loads(probed.content)["instance"]), what
        assert not cancelled or any(cancelled in request.path for request in seen), what
    assert sum(not e.cancelled for e in exchanged) >= 200
    assert sum(bool(e.answers) and e.answers[0].status == 202 for e in exchanged) >= 20


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.2"])
def test_a_proxy_may_pass_on_an_offer_long_before_the_body(
    web_proxy: Proxy, api: LiveApi, offer: bytes
) -> None:
    """
    The body, sent only after the 100, is still read as a body; it is not JSON.
    """
    task_id = api.send("POST", "/tasks", b'{"name":"canary"}').json["id"]
    body = cancelling(task_id)
    lines = b"Connection: Upgrade\r\nUpgrade: %b\r\nExpect: 100-continue\r\n" % offer
    address = ("127.0.0.1", web_proxy.port)
    with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
        connection.sendall(post(lines, length(body), body=b""))
        received = connection.recv(1_000)
        connection.sendall(body + PROBE)
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65_536):
                received += chunk

    answer, probed = _answers(received)
    assert (400, "/problems/malformed-json") == (answer.status, answer.problem)
    assert "line 1, column 1" in json.loads(answer.content)["detail"]
    assert (404, "/probe") == (probed.status, json.loads(probed.content)["instance"])
    assert "PENDING" == api.send("GET", f"/tasks/{task_id}").json["status"]


def _exchange_all(proxy: Proxy, api: LiveApi) -> Iterator[Exchanged]:
    task_id = ""
    for number, what in enumerate(WHATS):
        if not task_id:
            task_id = api.send("POST", "/tasks", b'{"name":"canary"}').json["id"]
        sent = {sent.what: sent for sent in corpus(cancelling(task_id))}[what]
        address = f"127.9.{number // 250}.{number % 250 + 1}"
        answers = list(_answers(_through(proxy, sent.bytes, source=address)))
        (probed,) = _answers(_through(proxy, PROBE, source="127.8.8.8"))
        cancelled = api.send("GET", f"/tasks/{task_id}").json["status"] != "PENDING"
        yield Exchanged(what, address, answers, probed, task_id if cancelled else "")
        if cancelled:
            task_id = ""


def _answers(received: bytes) -> Iterator[Answer]:
    """
    Parse a proxy's answers, which have more ways to state their length; skip interim ones.
    """
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/1."):
            yield Answer(WITHOUT_STATUS, {}, b"")  # Answers to HTTP/0.9 have no head.
            return
        status = int(first.split(" ")[1])
        headers = {name.lower(): value for name, value in (x.split(": ", 1) for x in lines)}
        if headers.get("transfer-encoding") == "chunked":
            content, received = _unchunked(received)
        elif status < 200 or status == 204:
            content = b""
        else:
            size = int(headers.get("content-length", len(received)))
            content, received = received[:size], received[size:]
        if status >= 200:
            yield Answer(status, headers, content)


def _unchunked(received: bytes) -> tuple[bytes, bytes]:
    content = b""
    size = -1
    while size:
        line, _, received = received.partition(b"\r\n")
        size = int(line, 16)
        content += received[:size]
        received = received[size + 2 :]
    return content, received


def _through(proxy: Proxy, sent: bytes, *, source: str) -> bytes:
    """
    Send everything, half-close, and read to the end.
    """
    received = b""
    with socket.create_connection(
        ("127.0.0.1", proxy.port), timeout=PATIENCE_SECONDS, source_address=(source, 0)
    ) as connection:
        # The proxy may close before it has read everything.
        with contextlib.suppress(OSError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65_536):
                received += chunk
    return received
