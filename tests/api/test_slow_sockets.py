"""
Five hundred clients that hold their sockets and do nothing useful with them: everybody else is
served as before, and the server itself puts an end to each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from api.live import JSON, PATIENCE_SECONDS, LiveApi, live_api

SOCKETS = 500
SOCKETS_THAT_READ_NOTHING = 20
DROP_SECONDS = 1.0
SERVER_PATIENCE_SECONDS = 10

# The defaults, up to 30 seconds, are right for users and long for a test. A slow machine needs some
# seconds to open so many sockets.
IMPATIENT = f"""
import uvicorn
from asyncflow.api import body
from asyncflow.api.protocol import BoundedProtocol

body.BODY_SECONDS_MAX = {SERVER_PATIENCE_SECONDS}
BoundedProtocol.head_seconds_max = {SERVER_PATIENCE_SECONDS}
BoundedProtocol.unread_seconds_max = {SERVER_PATIENCE_SECONDS}
Config = uvicorn.Config
uvicorn.Config = lambda *arguments, **more: Config(
    *arguments, **{{**more, "timeout_keep_alive": {SERVER_PATIENCE_SECONDS}}}
)
"""

GET = b"GET /health/live HTTP/1.1\r\nHost: api\r\n\r\n"
POST = b"POST /tasks HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\n"

Slow = Callable[[int], Coroutine[Any, Any, None]]
"""A client of a port; returns when the server has put an end to it."""


def dribbling(head: bytes, drop: bytes = b"", *, leaves: bool = False) -> Slow:
    """
    A client that sends `head`, and then `drop` again and again.

    Args:
        leaves: It says that it will send nothing more after `head`, and waits.
    """

    async def run(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        if leaves:
            writer.write_eof()
        ended = asyncio.create_task(reader.read())
        while not ended.done():
            await asyncio.wait({ended}, timeout=DROP_SECONDS if drop else None)
            if drop:
                writer.write(drop)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await ended

    return run


KINDS: dict[str, Slow] = {
    "silent": dribbling(b""),
    "slow head": dribbling(b"GET /health/live HTTP/1.1\r\nX-Slow: ", b"x"),
    "slow body": dribbling(POST + b"Content-Length: 100000\r\n\r\n{", b" "),
    "slow chunks": dribbling(POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n"),
    "idle": dribbling(GET),
    "idle, then half a head": dribbling(GET + b"GET /health/live HTT"),
    "line breaks after a request": dribbling(GET, b"\r\n"),
    "a body nobody reads": dribbling(GET[:-2] + b"Content-Length: 100000\r\n\r\n", b" "),
    "half closed in a head": dribbling(b"GET /health/live HTTP/1.1\r\n", leaves=True),
    "half closed in a body": dribbling(POST + b"Content-Length: 100\r\n\r\n{", leaves=True),
}


@asynccontextmanager
async def reading_nothing(port: int) -> AsyncIterator[None]:
    """
    Clients that ask for some megabytes each and never read.
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


async def test_slow_sockets_slow_nobody_else_and_are_ended_by_the_server(
    database_url: str, tmp_path: Path
) -> None:
    """
    Slow heads, slow bodies, idle, half closed and deaf ones at once. Even if the latency of
    others rose to ten times what it is without them, that would be milliseconds; a server
    that waits for any of the slow ones takes seconds.
    """
    with live_api(database_url, tmp_path, prelude=IMPATIENT) as api:
        without = await asyncio.to_thread(latency_seconds, api)
        async with asyncio.TaskGroup() as group, reading_nothing(api.port):
            each = (SOCKETS - SOCKETS_THAT_READ_NOTHING) // len(KINDS)
            slow = [group.create_task(run(api.port)) for run in KINDS.values() for _ in range(each)]
            await until(lambda: api.connections >= SOCKETS - 2 * each)
            beside = await asyncio.to_thread(latency_seconds, api)
            still_there = api.connections
            await until(lambda: all(client.done() for client in slow))
            await until(lambda: api.connections == 0)

    assert still_there >= SOCKETS / 2  # Else nothing was measured.
    assert beside < 10 * without


def latency_seconds(api: LiveApi) -> float:
    """
    The median of some requests, from connecting to the answer.
    """
    seconds = []
    for _ in range(60):
        began = time.perf_counter()
        connection = HTTPConnection("127.0.0.1", api.port, timeout=PATIENCE_SECONDS)
        connection.request("POST", "/tasks", json.dumps({"name": "x"}), JSON)
        assert 202 == connection.getresponse().status
        connection.close()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


async def until(condition: Callable[[], bool]) -> None:
    """
    Wait until the state of the sockets is as it should be; they cannot call us.
    """
    async with asyncio.timeout(2 * PATIENCE_SECONDS):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.05)
