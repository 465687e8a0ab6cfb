"""
uvicorn's HTTP protocol with two bounds it lacks: how long the head of a request may take to
arrive, and how large it may be.

Without them a few hundred sockets that send one header byte every few seconds hold a server
for ever ("slowloris"), and one that sends headers without end fills its memory. Bodies have
their bounds in `body`. Idle connections are uvicorn's own `timeout_keep_alive`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class BoundedProtocol(HttpToolsProtocol):
    """
    Closes connections whose request head is too slow (408) or too large (431).

    Attributes:
        head_seconds_max: From the connection or the head's first byte to its last.
        head_bytes_max: Counted by reads of the socket, so a head may exceed it by one read.
    """

    head_seconds_max = 10.0
    head_bytes_max = 64 * 1024

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """
        A connection that never says anything must not stay, either.
        """
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """
        Count bytes while a head is incomplete.
        """
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.head_bytes_max:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """
        The first byte of a head.
        """
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """
        The last byte of a head.
        """
        self._head_ended()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """
        Nothing is awaited any more.
        """
        self._head_ended()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_ended()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(
            self.head_seconds_max, self._refuse, b"408 Request Timeout"
        )

    def _head_ended(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes) -> None:
        self._head_ended()
        if self.transport.is_closing():
            return
        # An answer to an earlier request on this connection may be half out.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
        self.transport.close()
