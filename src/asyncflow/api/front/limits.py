"""
How large the body of a request may be, and how long it may take to arrive.

Bytes are counted as they arrive; Content-Length is believed only when it already promises too
much. The head of a request has its limits in `protocol`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Generator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncflow.errors import Refusal

BODY_SECONDS_MAX = 30.0
"""A server that waits longer can be held by a few slow clients."""

DISCARD_SECONDS_MAX = 1.0
"""How long the rest of a body that is too large is read and thrown away."""


class Limits:
    """
    Refuses bodies that are too large (413) or too slow (408), as `app` reads them.

    Args:
        bytes_max: Largest body.
        seconds_max: Longest time from the first read of a body to its end.
    """

    def __init__(
        self, app: ASGIApp, *, bytes_max: int, seconds_max: float = BODY_SECONDS_MAX
    ) -> None:
        self._app = app
        self._bytes_max = bytes_max
        self._seconds_max = seconds_max

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """
        Serve one request.
        """
        limited = LimitedReceive(scope, receive, self._bytes_max, self._seconds_max)
        return self._app(scope, limited, send)


class LimitedReceive:
    """
    The `receive` of one request, with limits.

    Raises:
        Refusal: 408 or 413.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        bytes_max: int,
        seconds_max: float = BODY_SECONDS_MAX,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._bytes_max = bytes_max
        self._seconds_max = seconds_max
        self._bytes: int | None = None
        self._deadline: float | None = None
        self._ended = False

    async def __call__(self) -> Message:
        """
        The next part of the body, or the end of the connection.
        """
        if self._ended:
            return await self._receive()
        if self._bytes is None:
            if self._promises_too_much():
                raise await self._too_large()
            self._bytes = 0
        message = await self._next()
        self._bytes += len(message.get("body", b""))
        if self._bytes > self._bytes_max:
            raise await self._too_large()
        self._ended = not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        # Most bodies arrive together with their head, and a timer costs more than reading them
        # (7 of a submission's 42 µs). So it is set only once there is something to wait for.
        receiving = self._receive().__await__()
        try:
            awaited = next(receiving)
        except StopIteration as arrived:
            message: Message = arrived.value
            return message
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._seconds_max
        try:
            async with asyncio.timeout_at(self._deadline):
                return await _Begun(receiving, awaited)
        except TimeoutError:
            raise self._too_slow() from None

    def _promises_too_much(self) -> bool:
        length: bytes = dict(self._scope["headers"]).get(b"content-length", b"0")
        return length.isdigit() and (len(length) > 18 or int(length) > self._bytes_max)

    def _too_slow(self) -> Refusal:
        return Refusal(
            "request-timeout",
            f"The body did not arrive within {self._seconds_max:g} seconds.",
            headers={"Connection": "close"},
        )

    async def _too_large(self) -> Refusal:
        if b"expect" not in dict(self._scope["headers"]):
            await self._discard()
        # What the client still sends would be read as its next request.
        return Refusal(
            "body-too-large",
            f"The body is too large; at most {self._bytes_max} bytes are accepted.",
            headers={"Connection": "close"},
        )

    async def _discard(self) -> None:
        # A client that is still sending would see a reset connection and never our answer. Limits
        # may be nested; the outer one, too, ends this.
        with contextlib.suppress(TimeoutError, Refusal):
            async with asyncio.timeout(DISCARD_SECONDS_MAX):
                while (await self._receive()).get("more_body"):
                    pass


class _Begun:
    """
    The rest of something awaitable whose first step was taken by hand.
    """

    def __init__(self, steps: Generator[Any, Any, Message], awaited: Any) -> None:
        self._steps = steps
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, Message]:
        try:
            yield self._awaited
            return (yield from self._steps)
        finally:
            self._steps.close()
