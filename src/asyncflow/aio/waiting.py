"""
Waiting: for an event with a time limit, and between tries.

`set_within` is the one wait for "until something happens, but at most so long":

    while not stop.is_set():
        work()
        await set_within(stop, POLL_SECONDS)

`Delays` are the waits of a loop that tries again until something works:

    delays = Delays(1.0, longest=15.0)
    while True:
        try:
            await serve_one_connection(on_success=delays.reset)
        except TransportError:
            await asyncio.sleep(delays.next())

A loop that should not back off has constant delays: `Delays(1.5, jitter=0.8)` waits 0.3 to
1.5 seconds each time. When a task itself waits for its next attempt, see `domain.retry`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random as chance
from collections.abc import Callable


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """
    Wait until `event` is set, for at most `seconds`; return whether it is set.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


class Delays:
    """
    Delays between tries: the first one, then twice as long each time, up to the longest.

    Args:
        first: In seconds, more than 0.
        longest: In seconds; None keeps every delay as long as the first.
        jitter: The share of each delay that is random, 0 to 1, so that processes that fail
            together do not come back together. 0 waits exactly the delay; 0.5 waits from half
            of the delay to all of it.
        random: Draws a number in [0, 1).
    """

    def __init__(
        self,
        first: float,
        *,
        longest: float | None = None,
        jitter: float = 0.5,
        random: Callable[[], float] = chance.random,
    ) -> None:
        self._first = self._next = first
        self._longest = first if longest is None else longest
        self._jitter = jitter
        self._random = random

    def next(self) -> float:
        """
        The seconds to wait before the next try.
        """
        delay, self._next = self._next, min(self._longest, 2 * self._next)
        return delay * (1 - self._jitter * self._random())

    def reset(self) -> None:
        """
        Start with the first delay again, because a try worked.
        """
        self._next = self._first
