"""
One child process, as its worker sees it: how it runs an attempt, stops and dies.

A child runs one attempt at a time and is reused. Worker and child speak over a socket pair, see
`protocol`. A child leads its own process group, so that killing it reaches what the handler
started.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from typing import Protocol

from asyncflow.domain.outcome import Crashed, Failed, Failure, Outcome
from asyncflow.errors import ChildNotStarted
from asyncflow.forking import withhold
from asyncflow.handlers.context import Context, Progress
from asyncflow.handlers.registry import Handler
from asyncflow.worker.isolation.memory import memory_bytes
from asyncflow.worker.isolation.protocol import (
    Message,
    Reader,
    read_outcome,
    write,
    write_claim,
)

LEAVE_SECONDS = 1.0
"""How long an idle child may take to exit by itself, and a dying one to be reaped."""

LAST_WORDS_SECONDS = 0.5
"""How long after a child's death what it had written may take to be read."""


class ChildListener(Protocol):
    """
    What waits for an attempt in a child; called in the loop's thread.
    """

    def progressed(self, progress: Progress) -> None:
        """
        The handler reported progress.
        """

    def child_ended(self, outcome: Outcome, *, stop_seen: bool) -> None:
        """
        The handler ended; the child is ready for another attempt.
        """

    def child_died(self, end: Outcome, *, was_entered: bool) -> None:
        """
        The child died; `was_entered` is False if it had not taken the attempt up.
        """


class Child(asyncio.Protocol):
    """
    One child process.
    """

    def __init__(self, number: int, *, kill: Callable[[Child], None]) -> None:
        self.number = number
        self.pid = 0
        self.tasks = 0
        self.is_alive = True
        self.idle_since = 0.0
        self.memory_bytes_max: int | None = None
        self._kill = kill
        self._transport: asyncio.Transport
        self._reader = Reader()
        self._listener: ChildListener | None = None
        self._was_entered = False
        self._memory_found: int | None = None
        self._loading = ""
        loop = asyncio.get_running_loop()
        self._disconnected = asyncio.Event()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._death: asyncio.Future[tuple[str, int]] = loop.create_future()
        self.reaper = loop.create_task(self._reap())

    async def connect(self, ours: socket.socket) -> None:
        """
        Speak to the process over our end of its connection.
        """
        ours.setblocking(False)
        withhold(self, ours.fileno())
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_unix_connection(lambda: self, sock=ours)

    async def become_ready(self, load: Message | None, seconds: float) -> None:
        """
        Wait until it is ready.

        Args:
            load: What it has to load first; None if it is forked.

        Raises:
            ChildNotStarted: It died, could not load what it has to, or took too long.
        """
        if load is not None:
            self._send(load)
        try:
            async with asyncio.timeout(seconds):
                await self._ready
        except TimeoutError:
            self.kill()
            fact = f"it was not ready after {seconds:g} s, and loaded {self._loading!r}."
            raise ChildNotStarted(fact) from None
        except BaseException:
            self.kill()
            raise

    def die(self, words: str, status: int = 0) -> None:
        """
        It has died, or has not been started. For the nursery.
        """
        self.is_alive = False
        if not self._death.done():
            self._death.set_result((words, status))

    @property
    def is_idle(self) -> bool:
        """
        Whether it may take an attempt.
        """
        return self.is_alive and self._listener is None

    def run(
        self,
        handler: Handler,
        payload: str,
        context: Context,
        listener: ChildListener,
        *,
        bytes_max: int,
    ) -> None:
        """
        Start an attempt; `listener` hears of it until it ended or the child died.
        """
        self.tasks += 1
        self._listener = listener
        self._was_entered = False
        self.memory_bytes_max = handler.memory_bytes_max
        self._send(
            {
                "do": "run",
                "number": self.tasks,
                "handler": handler.name,
                "payload": payload,
                "claim": write_claim(context),
                "result_bytes_max": bytes_max,
            }
        )

    def ask_to_stop(self) -> None:
        """
        Pass a request to stop on to the running handler.
        """
        self._send({"do": "stop", "number": self.tasks})

    def kill(self) -> None:
        """
        End the child and everything the handler started, now.
        """
        self.is_alive = False
        self._kill(self)

    def check_memory(self) -> None:
        """
        Kill the child if its process tree holds more than the running handler may.
        """
        if self.memory_bytes_max is None or self._listener is None:
            return
        held = memory_bytes(self.pid)
        if held > self.memory_bytes_max:
            self._memory_found = held
            self.kill()

    async def leave(self) -> None:
        """
        Let the child exit by itself, but not for long; returns when it is reaped.
        """
        self.is_alive = False
        if self._listener is not None:
            self.kill()
        self._transport.close()
        await asyncio.wait([self.reaper], timeout=LEAVE_SECONDS)
        self.kill()
        await asyncio.wait([self.reaper])

    def data_received(self, data: bytes) -> None:
        for message in self._reader.feed(data):
            self._receive(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_alive = False
        self._disconnected.set()
        # Only death should close the connection. A child that lives on without it is of no use.
        asyncio.get_running_loop().call_later(LEAVE_SECONDS, self.kill)

    def _send(self, message: Message) -> None:
        if not self._transport.is_closing():  # else it is dying, and its reaper will say so
            self._transport.write(write(message))

    def _receive(self, message: Message) -> None:
        match message["tell"]:
            case "loading":
                self._loading = message["module"]
            case "ready":
                self._settle_ready(None)
            case "refused":
                self._settle_ready(message["reason"])
            case _:
                self._receive_of_attempt(message)

    def _settle_ready(self, reason: str | None) -> None:
        if self._ready.done():
            return
        if reason is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(ChildNotStarted(reason))
            self._ready.exception()  # perhaps nothing waits for it any more

    def _receive_of_attempt(self, message: Message) -> None:
        if self._listener is None or message["number"] != self.tasks:
            return
        match message["tell"]:
            case "started":
                self._was_entered = True
            case "progress":
                self._listener.progressed(Progress(message["fraction"], message["message"]))
            case "ended":
                listener, self._listener = self._listener, None
                listener.child_ended(
                    read_outcome(message["outcome"]), stop_seen=message["stop_seen"]
                )

    async def _reap(self) -> None:
        words, status = await self._death
        try:
            # The socket may still hold the outcome of an attempt that ended before the death. It
            # stays open as long as a forked grandchild that left the group holds it.
            await asyncio.wait_for(self._disconnected.wait(), LAST_WORDS_SECONDS)
        except TimeoutError:
            self._transport.close()
        self._settle_ready(f"It {words}.")
        if self._listener is not None:
            listener, self._listener = self._listener, None
            # A fresh child that dies immediately would do so again; a warm one died idle.
            was_entered = self._was_entered or self.tasks == 1
            listener.child_died(self._end(words, status), was_entered=was_entered)

    def _end(self, words: str, status: int) -> Outcome:
        if self._memory_found is not None:
            return Failed(
                Failure(
                    "MemoryExceeded",
                    f"The handler's processes held {_mebibytes(self._memory_found)} of memory, "
                    f"more than its limit of {_mebibytes(self.memory_bytes_max or 0)}, "
                    "and were killed.",
                )
            )
        message = f"The handler's process {words}."
        if not self._was_entered:
            message += " It had not entered the handler; its standard error may say why."
        elif status == -signal.SIGKILL:
            message += " Unless someone killed it, the system ran out of memory."
        return Crashed(Failure("Crashed", message))


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
