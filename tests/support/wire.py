"""
Proxies ("wires") between a process that is to fail and its servers, and a control socket for them
(`Desk`).

Beyond what `asyncflow.verify.proxy` can do, a wire holds back the answer to one statement:
PostgreSQL has committed it, or RabbitMQ has the message, but the process does not know. To do that
it tracks which statements a client of PostgreSQL runs (PostgreSQL, "Message Formats": Parse names a
statement, Bind makes it ready to run).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from urllib.parse import parse_qsl, urlsplit

from asyncflow.verify.proxy import Proxy, Way

POSTGRES_PORT = 5432
SSL_REQUEST = 80_877_103
AMQP_HEARTBEAT = 8


class Statements:
    """
    Tracks the statements that one client of PostgreSQL runs, from the bytes it sends.
    """

    def __init__(self) -> None:
        self._bytes = b""
        self._has_started = False
        self._named: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> list[bytes]:
        """
        Parse bytes from the client; return the statements that they run.
        """
        self._bytes += data
        run = []
        while (message := self._next()) is not None:
            kind, body = message
            if kind == b"P":
                name, text, _ = body.split(b"\0", 2)
                self._named[name] = text
            elif kind == b"B":
                _, name, _ = body.split(b"\0", 2)
                run.append(self._named.get(name, b""))
        return run

    def _next(self) -> tuple[bytes, bytes] | None:
        # The first messages of a connection have no type byte before their length.
        kind_bytes = 1 if self._has_started else 0
        head = kind_bytes + 4
        if len(self._bytes) < head:
            return None
        end = kind_bytes + int.from_bytes(self._bytes[kind_bytes:head], "big")
        if len(self._bytes) < end:
            return None
        message, self._bytes = self._bytes[:end], self._bytes[end:]
        body = message[head:]
        if self._has_started:
            return message[:1], body
        self._has_started = int.from_bytes(body[:4], "big") != SSL_REQUEST
        return b"", body


class Connection:
    """
    One connection over a wire.

    Attributes:
        is_held: Whether answers are held back.
    """

    def __init__(self) -> None:
        self.statements = Statements()
        self.is_held = False


_connection: ContextVar[Connection] = ContextVar("connection")


class Wire(Proxy):
    """
    A wire that can hold back answers.

    Args:
        url: The URL of the server; PostgreSQL may be on a Unix socket.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._speaks_postgres = self._parts.scheme.startswith("postgres")
        self._folder = dict(parse_qsl(self._parts.query)).get("host")
        self._awaited: bytes | None = None
        self._answered = asyncio.Event()
        self._released = asyncio.Event()
        super().__init__(self._parts.hostname or "", self._parts.port or POSTGRES_PORT)

    @property
    def url(self) -> str:
        """
        The server's URL through this wire, once it is started.
        """
        login = self._parts.netloc.rpartition("@")[0]
        return self._parts._replace(netloc=f"{login}@127.0.0.1:{self.port}", query="").geturl()

    def hold_answers(self, statement: str) -> None:
        """
        Hold back all answers to a client from the moment it runs a statement that contains
        `statement`; with RabbitMQ, from the moment it sends anything.
        """
        self._answered.clear()
        self._released.clear()
        self._awaited = statement.encode()

    async def has_answered(self) -> None:
        """
        Wait until an answer is being held back.
        """
        await self._answered.wait()

    def release_answers(self) -> None:
        """
        Let all answers through again.
        """
        self._released.set()

    async def close(self) -> None:
        self._released.set()
        await super().close()

    async def _reach_server(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._folder is None:
            return await super()._reach_server()
        return await asyncio.open_unix_connection(
            f"{self._folder}/.s.PGSQL.{self._parts.port or POSTGRES_PORT}"
        )

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Both directions of a connection are tasks started from here, so they see this value.
        _connection.set(Connection())
        await super()._accept(reader, writer)

    async def _meet(self, way: Way, data: bytes) -> None:
        connection = _connection.get()
        if not way.is_answer:
            connection.is_held |= self._is_awaited(connection, data)
        elif connection.is_held and data[0] != AMQP_HEARTBEAT:
            self._answered.set()
            await self._released.wait()

    def _is_awaited(self, connection: Connection, data: bytes) -> bool:
        """
        Whether the answer to these bytes of a client must be held back.
        """
        if self._speaks_postgres:
            said = connection.statements.feed(data)
        else:
            said = [] if data[0] == AMQP_HEARTBEAT else [data]
        awaited = self._awaited
        if awaited is None or not any(awaited in text for text in said):
            return False
        self._awaited = None
        return True


class Desk:
    """
    Accepts commands for wires over a socket: one per line, each acknowledged by a line when done.
    """

    def __init__(self, wires: Mapping[str, Wire]) -> None:
        self.port = 0
        self._wires = wires

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Desk]:
        """
        Accept commands on `port`.
        """
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        order = (await reader.readline()).decode().rstrip("\n")
        # The client may have been killed meanwhile, or have timed out.
        with contextlib.suppress(ConnectionError):
            await self._obey(order)
            writer.write(b"done\n")
            await writer.drain()
        writer.close()

    async def _obey(self, order: str) -> None:
        verb, _, rest = order.partition(" ")
        name, _, statement = rest.partition(" ")
        wire = self._wires[name]
        match verb:
            case "cut":
                wire.reset()
            case "hold":
                wire.hold_answers(statement)
            case "answered":
                await wire.has_answered()
            case "release":
                wire.release_answers()
            case _:
                raise ValueError(f"unknown order {order!r}")


@asynccontextmanager
async def laid(urls: Mapping[str, str]) -> AsyncIterator[dict[str, Wire]]:
    """
    Start a wire to each of these servers.
    """
    wires: dict[str, Wire] = {}
    try:
        for name, url in urls.items():
            wires[name] = wire = Wire(url)
            await wire.start()
        yield wires
    finally:
        for wire in wires.values():
            await wire.close()
