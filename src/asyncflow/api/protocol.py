"""
uvicorn's HTTP protocol with three bounds it lacks: how long the head of a request may take to
arrive, how large it may be, and how long a client may leave its answers unread. And one saving:
answers leave in one piece.

Without the bounds a few hundred sockets that send one header byte every few seconds hold a
server for ever ("slowloris"), and so do those that read nothing; one that sends headers without
end fills its memory. Bodies have their bounds in `body`. Idle connections are uvicorn's own
`timeout_keep_alive`, as long as they say nothing at all.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class BoundedProtocol(HttpToolsProtocol):
    """
    Closes connections whose request head is too slow (408) or too large (431), and those whose
    client does not read.

    Attributes:
        head_seconds_max: From the connection or the head's first byte to its last.
        head_bytes_max: Counted by reads of the socket, so a head may exceed it by one read.
        unread_seconds_max: How long answers may wait for the client to read those before.
    """

    head_seconds_max = 10.0
    head_bytes_max = 64 * 1024
    unread_seconds_max = 30.0

    _head_expected = True
    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """
        A connection that never says anything must not stay, either.
        """
        joined = _JoinedWrites(transport, self.loop, unread_seconds_max=self.unread_seconds_max)
        super().connection_made(cast(asyncio.Transport, joined))
        self._limit_head()

    def data_received(self, data: bytes) -> None:
        """
        Count bytes and seconds while a head is incomplete; most come whole.
        """
        super().data_received(data)
        if self._head_expected:
            self._limit_head()
            self._head_bytes += len(data)
            if self._head_bytes > self.head_bytes_max:
                self._refuse(b"431 Request Header Fields Too Large")
        elif self.cycle is not None and self.cycle.response_complete:
            # Line breaks between two requests, or the rest of a body that was refused unread.
            # uvicorn takes them for the next request and stops its own timer.
            self._limit_head()

    def on_message_begin(self) -> None:
        """
        The first byte of a head.
        """
        super().on_message_begin()
        self._head_ended()
        self._head_expected = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """
        What follows a chunked body is no part of the head: a proxy before us has not seen it.
        """
        if self._head_expected:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """
        The last byte of a head.
        """
        self._head_ended()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """
        The client does not read as fast as we answer.
        """
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self.unread_seconds_max, self.transport.abort)

    def resume_writing(self) -> None:
        """
        It has read most of it.
        """
        self._reading_awaited_no_more()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """
        Nothing is awaited any more.
        """
        self._head_ended()
        self._reading_awaited_no_more()
        super().connection_lost(exc)

    def _limit_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(
                self.head_seconds_max, self._refuse, b"408 Request Timeout"
            )

    def _head_ended(self) -> None:
        self._head_expected = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _reading_awaited_no_more(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _refuse(self, status: bytes) -> None:
        has_begun = self._head_expected
        self._head_ended()
        if self.transport.is_closing():
            return
        # An answer to an earlier request on this connection may be half out.
        if has_begun and (self.cycle is None or self.cycle.response_complete):
            self.transport.write(
                b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
        self.transport.close()


class _JoinedWrites:
    """
    A transport that sends together what is written in one turn of the event loop.

    uvicorn writes the head and the body of an answer apart. Each write is a system call that
    wakes the client: a tenth of the API's CPU per submission goes into the second one.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        *,
        unread_seconds_max: float,
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._unread_seconds_max = unread_seconds_max
        self._written: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()
        if self._transport.get_write_buffer_size():
            # It closes once the client has read everything, which may be never.
            self._loop.call_later(self._unread_seconds_max, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        written, self._written = self._written, []
        # The client may have left since it was written.
        if written and not self._transport.is_closing():
            self._transport.write(b"".join(written))
