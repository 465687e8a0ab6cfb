"""
The worker's side of child processes: start, lend, watch, kill.

A child is forked from the worker's nursery, see `worker/nursery`, runs one attempt at a time and
is reused. Worker and child speak over a socket pair, see `worker/child_protocol`. A child leads
its own process group, so killing it reaches what the handler started.

What an attempt comes to is decided in `worker/isolation`.
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
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from asyncflow.domain.outcome import Crashed, Failed, Failure, Outcome
from asyncflow.errors import ChildNotStarted, HandlerError
from asyncflow.forking import withhold
from asyncflow.handlers.context import Context, Progress
from asyncflow.handlers.registry import Handler
from asyncflow.worker.child_protocol import Message, Reader, read_outcome, write, write_claim

NURSERY = "asyncflow.worker.nursery"
MEMORY_CHECK_SECONDS = 0.1
LEAVE_SECONDS = 1.0
"""How long an idle child may take to exit by itself, and a dying one to be reaped."""

CLOSE_SECONDS = 5.0
"""How long a worker that ends waits to hear that its children have died."""

LAST_WORDS_SECONDS = 0.5
"""How long after a child's death what it had written may take to be read."""

START_SECONDS_MIN, START_SECONDS_MAX = 60.0, 3_600.0
START_SHARE = 10.0
"""A child may take so many times as long to start as the nursery took to load, within bounds."""

IDLE_SECONDS = 60.0
"""An idle child leaves after this long without an attempt."""


class Listener(Protocol):
    """
    Whoever waits for an attempt in a child; called in the loop's thread.
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
        child = Child(self, self._number)
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
            self._loaded.exception()  # perhaps nobody waits for it
        for child in self._children.values():
            _kill_group(child.pid)
            child.die("was killed with its worker's nursery", -signal.SIGKILL)
        self._children.clear()


class Child(asyncio.Protocol):
    """
    One child process.
    """

    def __init__(self, nursery: Nursery, number: int) -> None:
        self.number = number
        self.pid = 0
        self.tasks = 0
        self.is_alive = True
        self.idle_since = 0.0
        self.memory_bytes_max: int | None = None
        self._nursery = nursery
        self._transport: asyncio.Transport
        self._reader = Reader()
        self._listener: Listener | None = None
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
        listener: Listener,
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
        self._nursery.kill(self)

    def check_memory(self) -> None:
        """
        Kill the child if its process tree holds more than the running handler may.
        """
        if self.memory_bytes_max is None or self._listener is None:
            return
        held = _memory_bytes(self.pid)
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
        # Nothing but death should close the connection. Whoever lives on without it is lost.
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
            self._ready.exception()  # perhaps nobody waits for it any more

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
            # stays open for ever if a forked grandchild left the group and holds it.
            await asyncio.wait_for(self._disconnected.wait(), LAST_WORDS_SECONDS)
        except TimeoutError:
            self._transport.close()
        self._settle_ready(f"It {words}.")
        if self._listener is not None:
            listener, self._listener = self._listener, None
            # A fresh child that dies at once would do so again; a warm one died idle.
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
            message += " If nobody killed it, the system ran out of memory."
        return Crashed(Failure("Crashed", message))


class Children:
    """
    The children of one worker, started on demand and kept warm.

    Args:
        idle_max: How many idle ones are kept, 0 or more.
        tasks_max: After how many attempts a child is replaced, 1 or more.
        idle_seconds: How long one is kept without an attempt.
    """

    def __init__(
        self,
        nursery: Nursery,
        *,
        idle_max: int,
        tasks_max: int,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._nursery = nursery
        self._idle_seconds = idle_seconds
        self._sweep: asyncio.TimerHandle | None = None
        self._idle_max = idle_max
        self._tasks_max = tasks_max
        self._idle: list[Child] = []
        self._lent: set[Child] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._memory_watch: asyncio.Task[None] | None = None

    async def lend(self) -> Child:
        """
        An idle child, or a new one; give it back with `take_back`.

        Raises:
            ChildNotStarted: None can be started.
        """
        while self._idle:
            child = self._idle.pop()
            if child.is_idle:
                break
        else:
            child = await self._nursery.child()
        self._lent.add(child)
        if self._memory_watch is None:
            self._memory_watch = asyncio.get_running_loop().create_task(self._watch_memory())
        return child

    def take_back(self, child: Child) -> None:
        """
        Keep `child` for the next attempt, or let it leave if it is used up, busy or dead.
        """
        self._lent.discard(child)
        is_fit = child.is_idle and child.tasks < self._tasks_max
        if is_fit and len(self._idle) < self._idle_max:
            child.idle_since = time.monotonic()
            self._idle.append(child)
            self._sweep_later()
        elif not child.reaper.done():
            self._dismiss(child)

    async def close(self) -> None:
        """
        End all of them and wait until they are gone.
        """
        if self._sweep is not None:
            self._sweep.cancel()
        for child in self._lent:
            child.kill()
        while self._idle:
            self._dismiss(self._idle.pop())
        remaining = {child.reaper for child in self._lent} | self._leaving
        if remaining:
            # A nursery that tells of no death any more is closed next, and they with it.
            await asyncio.wait(remaining, timeout=CLOSE_SECONDS)

    def _sweep_later(self) -> None:
        if self._sweep is None and self._idle:
            seconds = self._idle[0].idle_since + self._idle_seconds - time.monotonic()
            self._sweep = asyncio.get_running_loop().call_later(seconds, self._dismiss_idle)

    def _dismiss_idle(self) -> None:
        # The first is idle for longest: what is lent is the last one that came back.
        self._sweep = None
        while self._idle and self._idle[0].idle_since + self._idle_seconds <= time.monotonic():
            self._dismiss(self._idle.pop(0))
        self._sweep_later()

    def _dismiss(self, child: Child) -> None:
        leaving = asyncio.get_running_loop().create_task(child.leave())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _watch_memory(self) -> None:
        while self._lent:
            for child in self._lent:
                child.check_memory()
            await asyncio.sleep(MEMORY_CHECK_SECONDS)
        self._memory_watch = None


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


def _memory_bytes(pid: int) -> int:
    """
    Resident memory of a process and its descendants; shared pages count once in each.
    """
    import psutil  # Most workers limit no memory and save this much of it: 1 MB.

    total = 0
    pending = [pid]
    while pending:
        each = pending.pop()
        try:
            total += psutil.Process(each).memory_info().rss
            pending += _child_pids(each)
        except psutil.Error:
            continue  # it ended meanwhile
    return total


def _child_pids(pid: int) -> list[int]:
    import psutil

    # psutil finds children by reading every process of the machine; Linux can list them.
    try:
        lists = list(Path(f"/proc/{pid}/task").glob("*/children"))
        if not lists:
            return [child.pid for child in psutil.Process(pid).children()]
        return [int(child) for each in lists for child in each.read_text().split()]
    except (OSError, psutil.Error):
        return []  # it ended meanwhile


def _mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
