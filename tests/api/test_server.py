"""
What only a server with real sockets can get wrong.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from asyncflow.api.front.protocol import BoundedProtocol
from asyncflow.errors import AddressTaken
from asyncflow.processes import api as processes
from asyncflow.processes.api import listen, serve_api
from asyncflow.settings import Settings
from asyncflow.store.database import Database
from asyncflow.transport.amqp.url import parse_url
from asyncflow.urls import address
from tests.support.live import live_api
from tests.support.ports import free_port


class ImpatientProtocol(BoundedProtocol):
    """
    The API's protocol, with a short time limit for heads.
    """

    head_seconds_max = 0.3


@pytest.fixture
async def port(app: FastAPI) -> AsyncIterator[int]:
    """
    The port of a server on loopback.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=ImpatientProtocol, ws="none", lifespan="off", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    yield listening.getsockname()[1]
    server.should_exit = True
    await serving
    listening.close()


def has_ipv6() -> bool:
    """
    Whether this machine can listen on ::1.
    """
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


async def exchange(port: int, sent: bytes, *, then_close: bool = False) -> bytes:
    """
    Send some bytes and read until the server closes.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    if then_close:
        writer.write_eof()
    async with asyncio.timeout(10):
        received = await reader.read()
    writer.close()
    return received


def post(content: bytes, *headers: bytes, length: int | None = None) -> bytes:
    lines = [
        b"POST /tasks HTTP/1.1",
        b"Host: api",
        b"Content-Type: application/json",
        b"Content-Length: %d" % (len(content) if length is None else length),
        *headers,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + content


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def rows(db: Database) -> int:
    count: int = await db.fetchval("SELECT count(*) FROM asyncflow.tasks")
    return count


async def test_a_task_can_be_submitted_over_a_socket(port: int, db: Database) -> None:
    """
    The whole path works, with a body that arrives in several pieces.
    """
    request = post(b'{"name":"x"}', b"Connection: close")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for byte in request:
        writer.write(bytes([byte]))
        await writer.drain()
    answer = await reader.read()
    writer.close()

    assert 202 == status_of(answer)
    assert "PENDING" == json.loads(answer.partition(b"\r\n\r\n")[2])["status"]
    assert 1 == await rows(db)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"hOST: attacker.example", 421),
        (b"hOST: api\r\nORIGIN: http://attacker.example", 403),
        (b"hOST: api\r\niDEMPOTENCY-kEY: 1\r\nIdempotency-Key: 1", 501),
        (b"hOST: api\r\nOrigin: http://api", 202),
    ],
)
async def test_the_gate_knows_headers_in_any_case(
    port: int, db: Database, header: bytes, status: int
) -> None:
    """
    The gate recognises headers in any case, and repeated ones.
    """
    request = post(b'{"name":"x"}', b"Connection: close").replace(b"Host: api", header)
    answer = await exchange(port, request)

    assert status_of(answer) == status
    assert await rows(db) == (1 if status == 202 else 0)


class Wire(asyncio.Transport):
    """
    The far side of one connection; records each write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.written = asyncio.Event()
        self.cut = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """
        Record what would be one system call and one segment.
        """
        assert not self.cut
        self.pieces.append(bytes(data))
        self.written.set()

    def is_closing(self) -> bool:
        """
        Whether the client has left.
        """
        return self.cut


def test_an_idle_connection_is_kept_as_long_as_it_is_set(database_url: str, tmp_path: Path) -> None:
    """
    The setting applies; its default is longer than the 60 seconds of common load balancers.
    """
    with live_api(database_url, tmp_path, api_keep_alive_seconds=1.5) as api:
        began = time.monotonic()
        answer = api.exchange(b"GET /health/live HTTP/1.1\r\nHost: api\r\n\r\n")
        kept_seconds = time.monotonic() - began

    assert 200 == status_of(answer)
    assert kept_seconds >= 1.5
    assert Settings().api_keep_alive_seconds > 60


async def test_what_is_loaded_at_the_start_is_left_out_of_garbage_collection(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The start freezes what is loaded: a garbage collection over the whole web framework would hold
    up every request.
    """
    frozen = []

    async def serve(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        frozen.append(gc.get_freeze_count())
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.2.3")
    gc.unfreeze()
    try:
        await serve_api(Settings(database_url=database_url, api_port=free_port()))
    finally:
        gc.unfreeze()

    assert frozen[0] > 10_000


def test_the_server_leaves_signals_to_the_process() -> None:
    """
    The server does not replace the handlers of SIGINT and SIGTERM, as Uvicorn normally would.
    """
    server = processes._server(uvicorn.Config("unused"))
    before = signal.getsignal(signal.SIGTERM)

    with server.capture_signals():
        during = signal.getsignal(signal.SIGTERM)

    assert before == during


async def test_a_port_that_is_taken_while_the_database_is_awaited_is_one_sentence(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The port is only known to be taken on `listen`: several sockets can be bound to one port until
    one of them listens.
    """
    port = free_port()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))

        async def until_fit(*_: object) -> None:
            other.listen()

        monkeypatch.setattr(processes, "until_fit", until_fit)
        with pytest.raises(AddressTaken, match=f"cannot listen on 127.0.0.1:{port} "):
            await serve_api(Settings(database_url=database_url, api_port=port))


def test_an_ipv6_address_is_written_with_brackets() -> None:
    """
    Without brackets the last group of the address would be read as the port.
    """
    with pytest.raises(AddressTaken, match=r"cannot listen on \[2001:db8::1\]:3000 "):
        listen("2001:db8::1", 3000)
    assert "127.0.0.1:3000" == address("127.0.0.1", 3000)
    assert "[::1]:5672" == str(parse_url("amqp://guest:guest@[::1]"))


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_the_url_of_an_ipv6_address_can_be_opened_as_it_is_logged(
    database_url: str, tmp_path: Path
) -> None:
    """
    `process.started` logs a URL that works.
    """
    with live_api(database_url, tmp_path, api_host="::1") as api:
        [started] = [line for line in api.lines if line["event"] == "process.started"]
        answer = httpx.get(f"{started['url']}/health/live")

    assert f"http://[::1]:{api.port}" == started["url"]
    assert 200 == answer.status_code


async def test_an_answer_leaves_in_one_piece(app: FastAPI) -> None:
    """
    Head and body are sent in one write: each piece costs both sides a wakeup.
    """
    wire = Wire()
    protocol = BoundedProtocol(uvicorn.Config(app, log_config=None), ServerState(), {})
    protocol.connection_made(wire)

    protocol.data_received(post(b'{"name":"x"}'))
    async with asyncio.timeout(10):
        await wire.written.wait()
    protocol.connection_lost(ConnectionResetError())

    (answer,) = wire.pieces
    assert 202 == status_of(answer)
    assert answer.endswith(b"}")


async def test_an_answer_to_a_client_that_left_is_dropped() -> None:
    """
    An answer is dropped without an error, even if the client leaves just before it is sent.
    """
    wire = Wire()
    answered = asyncio.Event()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})
        wire.cut = True
        answered.set()

    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
    protocol = BoundedProtocol(uvicorn.Config(answer, log_config=None), ServerState(), {})
    protocol.connection_made(wire)

    protocol.data_received(post(b""))
    async with asyncio.timeout(10):
        await answered.wait()
    await asyncio.sleep(0)  # The turn in which the answer would be sent.
    protocol.connection_lost(ConnectionResetError())

    assert not wire.pieces
    assert not faults


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_a_client_that_sends_too_much_reads_why(
    port: int, settings: Settings, chunked: bool
) -> None:
    """
    A client that sends everything before it reads still gets the 413; then the connection ends.
    """
    content = b" " * (settings.api_body_bytes_max * 4)
    if chunked:
        request = (
            b"POST /tasks HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        )
    else:
        request = post(content)
    answer = await exchange(port, request)

    assert 413 == status_of(answer)
    assert b"connection: close" in answer.lower()
    assert answer.endswith(b"}")


async def test_a_large_body_that_was_only_announced_is_refused_immediately(
    port: int, settings: Settings
) -> None:
    """
    A client that sends `Expect: 100-continue` gets the 413 before it sends the body.
    """
    request = post(b"", b"Expect: 100-continue", length=settings.api_body_bytes_max + 1)
    answer = await exchange(port, request)

    assert 413 == status_of(answer)


@pytest.mark.parametrize("sent", [b"", b'{"name":'])
async def test_a_client_that_leaves_mid_body_leaves_nothing(
    port: int, db: Database, sent: bytes
) -> None:
    """
    Half a request stores nothing and is not logged as an error.
    """
    await exchange(port, post(sent, length=100), then_close=True)

    assert 0 == await rows(db)


async def test_a_client_that_leaves_after_its_body_leaves_one_task(port: int, db: Database) -> None:
    """
    A complete request is stored once, whether or not the client waits for the answer.
    """
    await exchange(port, post(b'{"name":"x"}'), then_close=True)

    async with asyncio.timeout(5):
        while await rows(db) == 0:  # noqa: ASYNC110 - no answer tells of it
            await asyncio.sleep(0.01)
    assert 1 == await rows(db)


@pytest.mark.parametrize("body_seconds_max", [0.2])
async def test_a_body_that_never_comes_is_refused(port: int) -> None:
    """
    The answer is 408, and the connection is closed.
    """
    answer = await exchange(port, post(b'{"na', length=100))

    assert 408 == status_of(answer)
    assert b"/problems/request-timeout" in answer


async def test_a_head_that_dribbles_is_refused(port: int) -> None:
    """
    The answer is 408 after a bounded time, however regularly single bytes arrive.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health/live HTTP/1.1\r\nX-Slow: ")
    answer = b""
    async with asyncio.timeout(5):
        while not answer:
            writer.write(b"x")
            try:
                answer = await asyncio.wait_for(reader.read(1000), 0.05)
            except TimeoutError:
                continue
    writer.close()

    assert 408 == status_of(answer)


async def test_a_connection_that_sends_nothing_is_closed(port: int) -> None:
    """
    A silent connection is closed after the limit: an open socket costs the server as much as the
    client.
    """
    answer = await exchange(port, b"")

    assert 408 == status_of(answer)


@pytest.mark.parametrize(
    ("request_bytes", "drop"),
    [
        (b"GET /health/live HTTP/1.1\r\nHost: api\r\n\r\n", b"\r\n"),
        (b"GET /health/live HTTP/1.1\r\nHost: api\r\nContent-Length: 9999\r\n\r\n", b" "),
        (b"POST /tasks HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["line breaks", "a body nobody reads", "a body that was refused"],
)
async def test_bytes_that_begin_no_request_hold_no_connection(
    port: int, request_bytes: bytes, drop: bytes
) -> None:
    """
    Stray bytes after an answer do not keep the connection open, however regularly they arrive.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes)
    answer = await reader.readuntil(b"}")
    async with asyncio.timeout(5):
        while not reader.at_eof():
            writer.write(drop)
            try:
                answer += await asyncio.wait_for(reader.read(1000), 0.05)
            except TimeoutError:
                continue
            except ConnectionError:
                break
    writer.close()

    assert 1 == answer.count(b"HTTP/1.1 ")


async def test_a_head_without_end_is_refused(port: int) -> None:
    """
    The answer is 431 long before the head fills the memory.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health/live HTTP/1.1\r\n")
    async with asyncio.timeout(5):
        try:
            while not writer.is_closing():
                writer.write(b"X-Filler: " + b"x" * 8000 + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        try:
            answer = await reader.read(1000)
        except ConnectionError:
            answer = b"HTTP/1.1 431 (reset)"
    writer.close()

    assert 431 == status_of(answer)


async def test_a_connection_serves_many_requests(port: int, db: Database) -> None:
    """
    A connection is kept alive beyond the time limit for a head, and pipelined requests are answered
    in order.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for name in (b"one", b"two"):
        writer.write(post(b'{"name":"%s"}' % name))
        answer = await reader.readuntil(b"}")
        assert 202 == status_of(answer)
        await asyncio.sleep(ImpatientProtocol.head_seconds_max * 1.5)
    writer.write(post(b'{"name":"three"}') + post(b'{"name":"four"}', b"Connection: close"))
    answers = await reader.read()
    writer.close()

    assert answers.index(b'"three"') < answers.index(b'"four"')
    assert 4 == await rows(db)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"POST /tasks HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        b"POST /tasks HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"GET /tasks HTTP/1.1\r\nHost : a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"hello\r\n\r\n",
    ],
)
async def test_ambiguous_requests_are_refused(port: int, request_bytes: bytes) -> None:
    """
    The answer is 400 and the connection is closed, so no request can be smuggled.
    """
    answer = await exchange(port, request_bytes)

    assert 400 == status_of(answer)
