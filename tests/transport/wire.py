"""
A wire to the broker that can be tampered with: it can freeze, or inject bytes.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit


class Wire:
    """
    A TCP relay to the broker that can freeze or inject bytes.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._to_client: list[asyncio.StreamWriter] = []
        self._relays: set[asyncio.Task[None]] = set()
        self.url = ""

    def freeze(self) -> None:
        """
        Stop carrying bytes in either direction, and leave all connections open.
        """
        self._flowing.clear()

    def thaw(self) -> None:
        """
        Carry bytes again, beginning with those held up.
        """
        self._flowing.set()

    def say(self, noise: bytes) -> None:
        """
        Send bytes to the clients as if the broker had sent them.
        """
        for writer in self._to_client:
            writer.write(noise)

    @asynccontextmanager
    async def laid(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
        """
        Run the relay, reachable at `url`.
        """
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0, ssl=tls)
        port = server.sockets[0].getsockname()[1]
        login = f"{self._parts.username or 'guest'}:{self._parts.password or 'guest'}"
        scheme = "amqps" if tls else "amqp"
        self.url = f"{scheme}://{login}@localhost:{port}{self._parts.path}"
        try:
            yield self
        finally:
            server.close()
            for relay in self._relays:
                relay.cancel()
            await asyncio.gather(*self._relays, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._relays.add(task)
        self._to_client.append(writer)
        host, port = self._parts.hostname, self._parts.port
        broker_reader, broker_writer = await asyncio.open_connection(host, port)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._carry(reader, broker_writer))
                directions.create_task(self._carry(broker_reader, writer))
        except* OSError:
            pass
        finally:
            writer.close()
            broker_writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await self._flowing.wait()
            data = await reader.read(65_536)
            await self._flowing.wait()
            if not data:
                raise ConnectionResetError
            writer.write(data)
            await writer.drain()
