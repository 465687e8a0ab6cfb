"""
A TCP proxy between one process and one server that can reset, hold, lose and forget connections.

Every process has its own proxies, so that "this worker alone has lost PostgreSQL" is one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass
from typing import NoReturn

CHUNK_BYTES = 65_536
ANSWER_SECONDS = 0.1
"""Within this time, a server that has begun to answer finishes what it was asked."""


@dataclass(frozen=True, slots=True)
class Way:
    """
    One direction of one connection.

    Attributes:
        relay: The connection, the same for both directions.
        is_answer: Whether this is the direction from the server to the client.
    """

    relay: asyncio.Task[None]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    is_answer: bool


class Proxy:
    """
    A TCP relay from a port of 127.0.0.1 to a server.

    Attributes:
        port: The port it listens on, once started.
        held_bytes: Total bytes that arrived while traffic was held.
        lost_bytes: Total bytes discarded by `lose`.
        forgotten_bytes: Total bytes sent over connections after `forget`.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.held_bytes = 0
        self.lost_bytes = 0
        self.forgotten_bytes = 0
        self._host, self._server_port = host, port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._relays: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._losing: set[asyncio.Task[None]] = set()
        self._loses_answers = False
        self._forgotten: set[asyncio.Task[None]] = set()

    @property
    def connections(self) -> int:
        """
        The number of open connections.
        """
        return len(self._relays - self._forgotten)

    async def start(self) -> None:
        """
        Start relaying.
        """
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """
        Close all connections and stop listening.
        """
        if self._server is not None:
            self._server.close()
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)

    def reset(self) -> int:
        """
        Reset every connection on both sides; return how many there were.
        """
        count = len(self._relays)
        for writer in tuple(self._writers):
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed already.
                # Closing with unsent data discarded makes it a reset.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        for relay in tuple(self._relays):
            relay.cancel()
        return count

    def hold(self) -> None:
        """
        Hold all traffic in both directions, with the connections open.
        """
        self._flowing.clear()

    def release(self) -> None:
        """
        Deliver the held traffic, late, and resume.
        """
        self._flowing.set()

    def lose(self, *, answers: bool) -> None:
        """
        Discard the next data to the server, or from it, on every open connection, and then break
        that connection.
        """
        self._loses_answers = answers
        self._losing = set(self._relays)

    def lose_no_more(self) -> None:
        """
        Spare the connections on which no data has come yet.
        """
        self._losing = set()

    def forget(self) -> int:
        """
        Silently drop all traffic of the open connections, as a firewall does after it has lost
        their state; new ones work. Return how many.

        The server's side of them stays open until the next call.
        """
        for relay in self._forgotten:
            relay.cancel()
        forgotten = self._relays - self._forgotten
        self._forgotten |= forgotten
        return len(forgotten)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        relay = asyncio.current_task()
        assert relay is not None
        self._relays.add(relay)
        self._writers.add(writer)
        upstream: asyncio.StreamWriter | None = None
        try:
            await self._flowing.wait()
            server_reader, upstream = await self._reach_server()
            self._writers.add(upstream)
            # When one side ends, both end.
            await asyncio.gather(
                self._carry(Way(relay, reader, upstream, is_answer=False)),
                self._carry(Way(relay, server_reader, writer, is_answer=True)),
            )
        except (OSError, EOFError, RuntimeError, asyncio.CancelledError):
            # uvloop raises RuntimeError if a transport has been closed meanwhile.
            pass
        finally:
            self._relays.discard(relay)
            self._losing.discard(relay)
            self._forgotten.discard(relay)
            for end in (writer, upstream):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()

    async def _reach_server(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._server_port)

    async def _carry(self, way: Way) -> None:
        try:
            while data := await way.reader.read(CHUNK_BYTES):
                if way.relay in self._forgotten:
                    self.forgotten_bytes += len(data)
                    continue
                await self._meet(way, data)
                way.writer.write(data)
                await way.writer.drain()
        except OSError:
            if way.relay not in self._forgotten:
                raise
        if way.relay in self._forgotten:
            # The other side does not learn that this one has ended.
            await asyncio.Event().wait()
        raise EOFError

    async def _meet(self, way: Way, data: bytes) -> None:
        """
        Apply the faults to data before it is passed on.
        """
        if way.relay in self._losing and way.is_answer == self._loses_answers:
            await self._throw_away(way, data)
        if not self._flowing.is_set():
            self.held_bytes += len(data)
            await self._flowing.wait()

    async def _throw_away(self, way: Way, data: bytes) -> NoReturn:
        """
        Discard this data and what follows immediately: an answer may begin before all is done.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                while data:
                    self.lost_bytes += len(data)
                    data = await way.reader.read(CHUNK_BYTES)
        raise ConnectionAbortedError
