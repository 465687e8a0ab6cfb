"""
Posts one body repeatedly over several connections: with `wrk` where it is installed, otherwise with
a small asyncio client in a separate process, which costs more CPU per request.

The report says which of the two was used; within a run it is the same for all systems.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import uvloop

BATCH, BATCH_CONNECTIONS = 100, 8
"""Tasks per request, and number of connections, where tasks are posted in batches."""

PATIENCE_SECONDS = 30.0
"""How long the answer to the last request may take."""


class Answers(NamedTuple):
    """
    The answers to a load.

    Attributes:
        refused: Number of answers other than 2xx.
    """

    per_second: float
    p50_ms: float
    p99_ms: float
    refused: int
    generator: str


def post_for(seconds: float, url: str, body: bytes, *, connections: int) -> Answers:
    """
    Post for some seconds; each connection sends its next request once the last is answered.

    Raises:
        CalledProcessError: The load generator failed; its reason is on standard error.
        TimeoutExpired: The load generator did not exit in time.
    """
    if shutil.which("wrk"):
        return _with_wrk(seconds, url, body, connections)
    done = subprocess.run(
        [sys.executable, "-m", "bench.http_load", url, str(seconds), str(connections)],
        input=body,
        stdout=subprocess.PIPE,
        timeout=seconds + 2 * PATIENCE_SECONDS,
        check=True,
    )
    return Answers(*json.loads(done.stdout))


def _with_wrk(seconds: float, url: str, body: bytes, connections: int) -> Answers:
    script = f"""
        wrk.method = "POST"
        wrk.body = [==[{body.decode()}]==]
        wrk.headers["Content-Type"] = "application/json"
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "post.lua"
        file.write_text(script)
        done = subprocess.run(
            ["wrk", "--threads", "1", "--connections", str(connections), "--latency"]
            + ["--duration", f"{round(seconds)}s", "--timeout", "10s", "--script", str(file), url],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return _read_wrk(done.stdout)


def _read_wrk(output: str) -> Answers:
    def first(pattern: str, default: str = "0") -> str:
        found = re.search(pattern, output, re.MULTILINE)
        return found[1] if found else default

    return Answers(
        per_second=float(first(r"Requests/sec:\s+([\d.]+)")),
        p50_ms=_milliseconds(first(r"^\s+50%\s+(\S+)", "0ms")),
        p99_ms=_milliseconds(first(r"^\s+99%\s+(\S+)", "0ms")),
        refused=int(first(r"Non-2xx or 3xx responses: (\d+)")),
        generator="wrk",
    )


def _milliseconds(text: str) -> float:
    value, unit = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text).groups()  # type: ignore[union-attr]
    return round(float(value) * {"us": 0.001, "ms": 1, "s": 1_000, "m": 60_000}[unit], 3)


class _Connection(asyncio.Protocol):
    """
    One keep-alive connection, which reads no more of an answer than it must.
    """

    def __init__(self, request: bytes, deadline: float) -> None:
        self.request = request
        self.deadline = deadline
        self.seconds: list[float] = []
        self.refused = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports resemble asyncio's without being a subclass.
        self._transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        if length is None or len(rest) < int(length[1]):
            return
        self._received = b""
        now = time.perf_counter()
        self.seconds.append(now - self._sent_at)
        self.refused += not head.startswith(b"HTTP/1.1 2")
        if now < self.deadline:
            self._send()
        else:
            self.closed.set_result(None)
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            fact = f"the server closed a connection in the middle: {error or 'no reason given'}"
            self.closed.set_exception(ConnectionError(fact))


async def _post(url: str, body: bytes, seconds: float, connections: int) -> Answers:
    parts = urlsplit(url)
    request = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    loop = asyncio.get_running_loop()
    host, port = parts.hostname or "localhost", parts.port or 80
    start = time.perf_counter()
    opened = [
        (await loop.create_connection(lambda: _Connection(request, start + seconds), host, port))[1]
        for _ in range(connections)
    ]
    async with asyncio.timeout(seconds + PATIENCE_SECONDS):
        await asyncio.gather(*[connection.closed for connection in opened])
    elapsed = time.perf_counter() - start
    took = sorted(second for connection in opened for second in connection.seconds)
    return Answers(
        per_second=len(took) / elapsed,
        p50_ms=round(1_000 * took[len(took) // 2], 3),
        p99_ms=round(1_000 * took[int(len(took) * 0.99)], 3),
        refused=sum(connection.refused for connection in opened),
        generator="a small Python client",
    )


if __name__ == "__main__":
    address, duration, count = sys.argv[1:]
    answers = uvloop.run(_post(address, sys.stdin.buffer.read(), float(duration), int(count)))
    print(json.dumps(answers))
