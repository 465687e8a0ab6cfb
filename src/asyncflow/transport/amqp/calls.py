"""
Waiting for the broker: calls and their replies, and a time limit on every wait.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable
from typing import TypeVar, cast

from pamqp import base

from asyncflow.errors import BrokerTimeout, MalformedFrame, TransportError

T = TypeVar("T")
MethodT = TypeVar("MethodT", bound=base.Frame)


class Calls:
    """
    The replies that one channel expects, in the order in which they must arrive.
    """

    def __init__(self) -> None:
        self._expected: deque[tuple[type[base.Frame], asyncio.Future[base.Frame]]] = deque()

    def expect(self, reply: type[MethodT]) -> asyncio.Future[MethodT]:
        """
        Expect a reply of this type next; call it in the same step that sends the call.

        A cancelled future keeps its place, so that its late reply is not taken for another
        call's.
        """
        future: asyncio.Future[base.Frame] = asyncio.get_running_loop().create_future()
        self._expected.append((reply, future))
        return cast("asyncio.Future[MethodT]", future)

    def answer(self, method: base.Frame) -> None:
        """
        Give a reply to the oldest call.

        Raises:
            MalformedFrame: The oldest call expects another type, or there is none.
        """
        if not self._expected or not isinstance(method, self._expected[0][0]):
            raise MalformedFrame(f"{method.name} answers no call.")
        _, future = self._expected.popleft()
        if not future.done():
            future.set_result(method)

    def fail(self, reason: TransportError) -> None:
        """
        Fail every call: no more replies will arrive.
        """
        while self._expected:
            _, future = self._expected.popleft()
            if not future.done():
                future.set_exception(reason)


async def within(seconds: float, call: str, waiting: Awaitable[T]) -> T:
    """
    Wait for something, at most this long.

    Raises:
        BrokerTimeout: It took longer; `waiting` was cancelled.
    """
    try:
        async with asyncio.timeout(seconds):
            return await waiting
    except TimeoutError as error:
        raise BrokerTimeout(call, seconds) from error
