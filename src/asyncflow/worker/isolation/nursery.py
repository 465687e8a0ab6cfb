"""
The process that child processes are forked from, as its worker sees it: start it, have it start
and kill children, hear how they die. What it does is in `nursery_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from asyncflow.errors import ChildNotStarted, HandlerError
from asyncflow.forking import withhold
from asyncflow.worker.isolation.child import LEAVE_SECONDS, Child
from asyncflow.worker.isolation.protocol import Message, Reader, write

NURSERY = "asyncflow.worker.isolation.nursery_process"

START_SECONDS_MIN, START_SECONDS_MAX = 60.0, 3_600.0
START_SHARE = 10.0
"""A child may take this many times as long to start as the nursery took to load, within bounds."""


class Nursery:
    """
    The process that children come from, as its worker sees it. Enter it to have it closed.

    Args:
        modules: What it loads, as for `load_handlers`.
        handlers: Names that must be among what it has loaded.
        logs: How it and its children log, as arguments of `configure_logs`; None leaves
            logging alone.
    """

    def __init__(
        self,
        modules: Sequence[str],
        *,
        handlers: Sequence[str] = (),
        logs: Message | None = None,
    ) -> None:
        self.start_seconds = START_SECONDS_MAX
        self._request: Message = {
            "do": "load",
            "modules": list(modules),
            "handlers": list(handlers),
            "logs": logs,
            "files": None,
        }
        self._forks = True
        self._starting = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._reader = Reader()
        self._loading = ""
        self._loaded: asyncio.Future[Message]
        self._children: dict[int, Child] = {}
        self._number = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """
        Have it running and its modules loaded.

        Raises:
            HandlerError: A module cannot be loaded, or has changed since the first start.
            OSError: The system has no process, memory or file descriptor left for it, or it did
                not get through in time.
        """
        async with self._starting:
            if self._socket is None:
                began = time.monotonic()
                try:
                    async with asyncio.timeout(self.start_seconds):
                        await self._start()
                except TimeoutError:
                    self._lose()
                    raise TimeoutError(
                        f"Loading {self._loading!r} took more than {self.start_seconds:g} s."
                    ) from None
                except BaseException:
                    self._lose()
                    raise
                took = time.monotonic() - began
                self.start_seconds = max(START_SECONDS_MIN, START_SHARE * took)

    async def child(self) -> Child:
        """
        A new child, ready for its first attempt.

        Raises:
            ChildNotStarted: The system has nothing left for it, or it did not get ready.
        """
        try:
            await self.start()
            ours, theirs = socket.socketpair()
        except (HandlerError, OSError) as error:
            raise ChildNotStarted(_in_words(error)) from error
        self._number += 1
        child = Child(self._number, kill=self.kill)
        with theirs:
            try:
                await child.connect(ours)
                self._order({"do": "start", "number": child.number}, theirs)
            except OSError as error:
                child.die("was not started")
                raise ChildNotStarted(_in_words(error)) from error
        self._children[child.number] = child
        await child.become_ready(None if self._forks else self._load(), self.start_seconds)
        return child

    def kill(self, child: Child) -> None:
        """
        End a child and everything its handler started, now.
        """
        if child.number in self._children:
            try:
                self._order({"do": "kill", "number": child.number})
            except OSError:
                _kill_group(child.pid)

    async def close(self) -> None:
        """
        End it, and what is left of its children.
        """
        process = self._process
        if process is None:
            return
        dying = {child.reaper for child in self._children.values()}
        self._lose()
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if dying:
            await asyncio.wait(dying)

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        self._socket, self._reader = ours, Reader()
        self._loaded = loop.create_future()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-P", "-m", NURSERY, str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        ours.setblocking(False)
        withhold(self, ours.fileno())
        await loop.sock_sendall(ours, write(self._load()))
        loop.add_reader(ours, self._receive)
        loaded = await self._loaded
        self._forks = loaded["forks"]
        self._request["files"] = loaded["files"]

    def _load(self) -> Message:
        return {**self._request, "path": sys.path}

    def _order(self, message: Message, with_socket: socket.socket | None = None) -> None:
        if self._socket is None:
            raise OSError("The nursery has died.")
        data = write(message)
        descriptors = [] if with_socket is None else [with_socket.fileno()]
        sent = socket.send_fds(self._socket, [data], descriptors)
        if sent < len(data):
            self._lose()  # the rest would be read as something else
            raise OSError("The nursery does not read.")

    def _receive(self) -> None:
        if self._socket is None:
            return
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        for message in self._reader.feed(data):
            self._hear(message)
        if not data:
            self._lose()

    def _hear(self, message: Message) -> None:
        match message["tell"]:
            case "loading":
                self._loading = message["module"]
            case "loaded":
                self._loaded.set_result(message)
            case "refused":
                self._loaded.set_exception(HandlerError(message["reason"]))
            case "started":
                self._children[message["number"]].pid = message["pid"]
            case "not_started":
                words = f"could not be started: {message['reason']}"
                self._children.pop(message["number"]).die(words)
            case "died":
                status = message["status"]
                self._children.pop(message["number"]).die(exit_in_words(status), status)

    def _lose(self) -> None:
        """
        Forget the process; it has died, or dies when it finds the connection closed.
        """
        lost, self._socket = self._socket, None
        if lost is None:
            return
        asyncio.get_running_loop().remove_reader(lost)
        lost.close()
        if not self._loaded.done():
            words = f"The process that loads handlers ended while it loaded {self._loading!r}."
            self._loaded.set_exception(HandlerError(words))
            self._loaded.exception()  # perhaps nothing waits for it
        for child in self._children.values():
            _kill_group(child.pid)
            child.die("was killed with its worker's nursery", -signal.SIGKILL)
        self._children.clear()


def exit_in_words(status: int) -> str:
    """
    A process's end for people, from its return code: negative is a signal's number.
    """
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"was killed by signal {-status}"


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return str(error)


def _kill_group(pid: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
