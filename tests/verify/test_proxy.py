"""
The proxy between a process and a server: it loses requests or answers, and breaks the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from asyncflow.verify.proxy import Proxy


class Server:
    """
    A server that records every line and answers it with `done`.
    """

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """
        Serve one connection until it ends.
        """
        while line := await reader.readline():
            self.asked.append(line)
            writer.write(b"done\n")
        writer.close()


@pytest.fixture
def server() -> Server:
    """
    The server behind the proxy.
    """
    return Server()


@pytest.fixture
async def proxy(server: Server) -> AsyncIterator[Proxy]:
    """
    The proxy in front of it.
    """
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    proxy = Proxy(*listening.sockets[0].getsockname())
    await proxy.start()
    yield proxy
    await proxy.close()
    listening.close()


class Client:
    """
    A connection that has been used once.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, line: bytes) -> bytes:
        """
        Send a line and return the answer; nothing if the connection breaks.
        """
        self._writer.write(line)
        try:
            return await self._reader.readline()
        except ConnectionError:
            return b""

    async def close(self) -> None:
        """
        Close the connection, if it is open.
        """
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


Connect = Callable[[], Awaitable[Client]]


@pytest.fixture
async def connect(proxy: Proxy) -> AsyncIterator[Connect]:
    """
    Connects clients to the server through the proxy.
    """
    clients: list[Client] = []

    async def connect() -> Client:
        clients.append(Client(*await asyncio.open_connection("127.0.0.1", proxy.port)))
        assert b"done\n" == await clients[-1].ask(b"first\n")
        return clients[-1]

    yield connect
    for client in clients:
        await client.close()


async def test_a_lost_request_never_arrives(server: Server, proxy: Proxy, connect: Connect) -> None:
    """
    The next request on each open connection is lost; a new connection works normally.
    """
    clients = [await connect() for _ in range(2)]
    proxy.lose(answers=False)
    later = await connect()

    assert [b"", b""] == [await client.ask(b"lost\n") for client in clients]
    assert b"done\n" == await later.ask(b"second\n")

    assert b"lost\n" not in server.asked
    assert 2 * len(b"lost\n") == proxy.lost_bytes


async def test_what_was_asked_is_done_when_the_answer_is_lost(
    server: Server, proxy: Proxy, connect: Connect
) -> None:
    """
    A request whose answer is lost is executed, and the client does not learn of it.
    """
    client = await connect()
    proxy.lose(answers=True)

    assert b"" == await client.ask(b"do it\n")

    assert b"do it\n" == server.asked[-1]
    assert len(b"done\n") == proxy.lost_bytes


async def test_a_connection_that_lost_nothing_goes_on(proxy: Proxy, connect: Connect) -> None:
    """
    Once the fault ends, a connection that lost nothing works normally.
    """
    client = await connect()
    proxy.lose(answers=False)
    proxy.lose_no_more()

    assert b"done\n" == await client.ask(b"second\n")
    assert 0 == proxy.lost_bytes


async def test_a_forgotten_connection_drops_everything_silently(
    server: Server, proxy: Proxy, connect: Connect
) -> None:
    """
    On a forgotten connection the client gets no answer and no error; new connections work.
    """
    client = await connect()
    assert 1 == proxy.forget()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await client.ask(b"lost\n")
    later = await connect()

    assert b"done\n" == await later.ask(b"second\n")
    assert b"lost\n" not in server.asked
    assert (1, len(b"lost\n")) == (proxy.connections, proxy.forgotten_bytes)
