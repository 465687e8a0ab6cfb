"""
Answers leave in one piece.

uvicorn writes the head and the body of an answer separately. Each write is a system call that
wakes the client: the second one costs a tenth of the API's CPU per submission.
"""

from __future__ import annotations

import asyncio
from typing import Any

LINGER_SECONDS = 1.0
"""How long a refused client's data is read and thrown away, so that it reads the answer."""


class JoinedWrites:
    """
    A transport that sends together what is written in one turn of the event loop.

    Args:
        unread_seconds_max: How long a closed connection waits for its client to read the rest.

    Attributes:
        lingers: Whether the client may still be sending when the connection closes. It would find
            the connection reset and might never read the answer, so closing waits.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        *,
        unread_seconds_max: float,
    ) -> None:
        self.lingers = False
        self._transport = transport
        self._loop = loop
        self._unread_seconds_max = unread_seconds_max
        self._written: list[bytes] = []
        self._is_closing = False

    def write(self, data: bytes) -> None:
        """
        Send `data` at the end of this turn.
        """
        if not self._written:
            self._loop.call_soon(self._flush)
        self._written.append(data)

    def is_closing(self) -> bool:
        """
        Whether nothing more is sent.
        """
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        """
        Send what was written, and close the connection.
        """
        self._flush()
        self._is_closing = True
        if self.lingers and not self._transport.is_closing():
            self.lingers = False
            self._transport.write_eof()
            self._loop.call_later(LINGER_SECONDS, self.close)
            return
        self._transport.close()
        if self._transport.get_write_buffer_size():
            # It closes once the client has read everything, which may never happen.
            self._loop.call_later(self._unread_seconds_max, self._transport.abort)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        written, self._written = self._written, []
        # The client may have left since it was written.
        if written and not self.is_closing():
            self._transport.write(b"".join(written))
