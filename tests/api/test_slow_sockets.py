"""
A hundred clients hold their sockets without doing anything useful: every other client is served,
and the server closes each of these sockets by itself.

No speed is measured. First the server's limits are hours, so a server that waited for any of these
clients would hang. Then the limits are one second, and every client waits to be closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from tests.support.live import JSON, PATIENCE_SECONDS, LiveApi, live_api

SOCKETS_PER_KIND = 10
SOCKETS_THAT_READ_NOTHING = 10
DROP_SECONDS = 0.2

pytestmark = pytest.mark.timeout(600)  # Catches a hang; generous enough for a slow machine.


@contextlib.contextmanager
def api_with_patience(database_url: str, folder: Path, *, seconds: int) -> Iterator[LiveApi]:
    """
    An API whose time limits (by default up to 75 seconds) are all `seconds`.
    """
    prelude = f"""
import functools
from asyncflow.api import app
from asyncflow.api.front.protocol import BoundedProtocol

app.create_app = functools.partial(app.create_app, body_seconds_max={seconds})
BoundedProtocol.head_seconds_max = {seconds}
BoundedProtocol.unread_seconds_max = {seconds}
"""
    with live_api(database_url, folder, prelude=prelude, api_keep_alive_seconds=seconds) as api:
        yield api


GET = b"GET /health/live HTTP/1.1\r\nHost: api\r\n\r\n"
POST = b"POST /tasks HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n"

Slow = Callable[[int], Coroutine[Any, Any, None]]
"""A slow client of this port; returns once the server has closed it."""


def dribbling(head: bytes, drop: bytes = b"", *, leaves: bool = False) -> Slow:
    """
    A client that sends `head`, and then `drop` repeatedly.

    Args:
        leaves: Half-close the connection after `head`, and wait.
    """

    async def run(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ended = asyncio.create_task(_until_ended(reader))
        try:
            writer.write(head)
            if leaves:
                writer.write_eof()
            while not ended.done():
                await asyncio.wait({ended}, timeout=DROP_SECONDS if drop else None)
                if drop:
                    writer.write(drop)
        finally:
            ended.cancel()
            writer.close()

    return run


async def _until_ended(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(65_536):
            pass


KINDS: dict[str, Slow] = {
    "silent": dribbling(b""),
    "slow head": dribbling(b"GET /health/live HTTP/1.1\r\nX-Slow: ", b"x"),
    "slow body": dribbling(POST + b"Content-Length: 100000\r\n\r\n{", b" "),
    "slow chunks": dribbling(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n"),
    "idle": dribbling(GET),
    "idle, then half a head": dribbling(GET + b"GET /health/live HTT"),
    "line breaks after a request": dribbling(GET, b"\r\n"),
    "a body nobody reads": dribbling(GET[:-2] + b"Content-Length: 100000\r\n\r\n", b" "),
}
LEAVING: dict[str, Slow] = {
    "half closed in a head": dribbling(b"GET /health/live HTTP/1.1\r\n", leaves=True),
    "half closed in a body": dribbling(POST + b"Content-Length: 100\r\n\r\n{", leaves=True),
}


@asynccontextmanager
async def reading_nothing(port: int) -> AsyncIterator[None]:
    """
    Clients that request some megabytes each and never read.
    """
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: api\r\n\r\n" * 400
    with contextlib.ExitStack() as sockets:
        for _ in range(SOCKETS_THAT_READ_NOTHING):
            deaf = sockets.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            deaf.setblocking(False)
            await asyncio.get_running_loop().sock_connect(deaf, ("127.0.0.1", port))
            deaf.send(asked)
        yield


async def test_slow_sockets_keep_no_other_client_from_being_served(
    database_url: str, tmp_path: Path
) -> None:
    """
    Others are served while slow heads, slow bodies, idle clients and clients that never read are
    connected, and none of these is closed.
    """
    with api_with_patience(database_url, tmp_path, seconds=3_600) as api:
        async with asyncio.TaskGroup() as group, reading_nothing(api.port):
            slow = [
                group.create_task(run(api.port))
                for run in KINDS.values()
                for _ in range(SOCKETS_PER_KIND)
            ]
            everyone = len(slow) + SOCKETS_THAT_READ_NOTHING
            await until(lambda: api.connections == everyone)
            for _ in range(20):
                await asyncio.to_thread(submit, api)
            await until(lambda: api.connections == everyone)
            ended = [client for client in slow if client.done()]
            for client in slow:
                client.cancel()

    assert not ended


async def test_the_server_ends_slow_sockets(database_url: str, tmp_path: Path) -> None:
    """
    Every kind of slow client is closed, including half-closed ones.
    """
    with api_with_patience(database_url, tmp_path, seconds=1) as api:
        async with asyncio.TaskGroup() as group, reading_nothing(api.port):
            for run in (*KINDS.values(), *LEAVING.values()):
                for _ in range(SOCKETS_PER_KIND):
                    group.create_task(run(api.port))
            await until(lambda: api.connections == 0)


def submit(api: LiveApi) -> None:
    """
    One ordinary request, from connecting to the answer.
    """
    with contextlib.closing(
        HTTPConnection("127.0.0.1", api.port, timeout=PATIENCE_SECONDS)
    ) as connection:
        connection.request("POST", "/tasks", json.dumps({"name": "x"}), JSON)
        assert 202 == connection.getresponse().status


async def until(condition: Callable[[], bool]) -> None:
    """
    Poll until the sockets are in the expected state; they cannot notify us.
    """
    while not condition():  # noqa: ASYNC110 - see above
        await asyncio.sleep(0.25)
