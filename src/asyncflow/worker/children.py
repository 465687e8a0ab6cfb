"""
The worker's side of child processes: start, lend, watch, kill.

Each child is `python -m asyncflow.worker.child`, runs one attempt at a time and is reused.
They speak over a socket pair, see `worker/child_protocol`. A child leads its own process
group, so killing it reaches what the handler started; and it dies with its parent, see
`worker/child`.

What an attempt comes to is decided in `worker/isolation`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Protocol

from asyncflow.domain.outcome import Crashed, Failed, Failure, Outcome
from asyncflow.forking import withhold
from asyncflow.handlers.context import Context, Progress
from asyncflow.handlers.registry import Handler
from asyncflow.worker.child_protocol import Message, Reader, read_outcome, write, write_context

MEMORY_CHECK_SECONDS = 0.1
LEAVE_SECONDS = 1.0
"""How long an idle child may take to exit by itself, and a dying one to be reaped."""

LAST_WORDS_SECONDS = 0.5
"""How long after a child's death what it had written may take to be read."""


class Listener(Protocol):
    """
    Whoever waits for an attempt in a child; called in the loop's thread.
    """

    def progressed(self, progress: Progress) -> None:
        """
        The handler reported progress.
        """

    def ended(self, outcome: Outcome, *, stop_seen: bool) -> None:
        """
        The handler ended; the child is ready for another attempt.
        """

    def died(self, end: Outcome, *, was_entered: bool) -> None:
        """
        The child died; `was_entered` is False if it had not taken the attempt up.
        """


class Child(asyncio.Protocol):
    """
    One child process.
    """

    def __init__(self) -> None:
        self.tasks = 0
        self.is_alive = True
        self.memory_bytes_max: int | None = None
        self._process: asyncio.subprocess.Process
        self._transport: asyncio.Transport
        self._reader = Reader()
        self._listener: Listener | None = None
        self._was_entered = False
        self._memory_found: int | None = None
        self._disconnected = asyncio.Event()
        self._is_reaped = False
        self.reaper: asyncio.Task[None]

    @classmethod
    async def start(cls, *, logs: Message | None) -> Child:
        """
        Start a process; it takes attempts at once and runs them when it is up.

        Args:
            logs: How it logs, as arguments of `configure_logs`; None leaves logging alone.

        Raises:
            OSError: If the system has no process, memory or file descriptor left for it.
        """
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-P", "-m", "asyncflow.worker.child"),
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            child = cls()
            child._process = process
            ours.setblocking(False)
            withhold(child, ours.fileno())
            child._transport, _ = await loop.create_unix_connection(lambda: child, sock=ours)
        except BaseException:
            ours.close()
            raise
        child.reaper = loop.create_task(child._reap())
        child._send({"do": "prepare", "path": sys.path, "logs": logs})
        return child

    @property
    def pid(self) -> int:
        """
        The process id, which is also the id of its process group.
        """
        return self._process.pid

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
                "module": handler.module,
                "handler": handler.name,
                "payload": payload,
                "context": write_context(context),
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
        if self._is_reaped:
            return  # its id may be another's by now
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # already gone; macOS says EPERM of a group of zombies

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
        if self._listener is None or message["number"] != self.tasks:
            return
        match message["tell"]:
            case "started":
                self._was_entered = True
            case "progress":
                self._listener.progressed(Progress(message["fraction"], message["message"]))
            case "ended":
                listener, self._listener = self._listener, None
                listener.ended(read_outcome(message["outcome"]), stop_seen=message["stop_seen"])

    async def _reap(self) -> None:
        status = await self._process.wait()
        self.is_alive = False
        self.kill()  # whatever is left of its group, which keeps its id until the last is gone
        self._is_reaped = True
        try:
            # The socket may still hold the outcome of an attempt that ended before the death. It
            # stays open for ever if a forked grandchild left the group and holds it.
            await asyncio.wait_for(self._disconnected.wait(), LAST_WORDS_SECONDS)
        except TimeoutError:
            self._transport.close()
        if self._listener is not None:
            listener, self._listener = self._listener, None
            # A fresh child that dies at once would do so again; a warm one died idle.
            was_entered = self._was_entered or self.tasks == 1
            listener.died(self._death(status), was_entered=was_entered)

    def _death(self, status: int) -> Outcome:
        if self._memory_found is not None:
            return Failed(
                Failure(
                    "MemoryExceeded",
                    f"The handler's processes held {_mebibytes(self._memory_found)} of memory, "
                    f"more than its limit of {_mebibytes(self.memory_bytes_max or 0)}, "
                    "and were killed.",
                )
            )
        message = f"The handler's process {exit_in_words(status)}."
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
        logs: How children log, see `Child.start`.
    """

    def __init__(self, *, idle_max: int, tasks_max: int, logs: Message | None) -> None:
        self._logs = logs
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
            OSError: If none can be started.
        """
        while self._idle:
            child = self._idle.pop()
            if child.is_idle:
                break
        else:
            child = await Child.start(logs=self._logs)
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
            self._idle.append(child)
        elif not child.reaper.done():
            self._dismiss(child)

    async def close(self) -> None:
        """
        End all of them and wait until they are gone.
        """
        for child in self._lent:
            child.kill()
        while self._idle:
            self._dismiss(self._idle.pop())
        remaining = {child.reaper for child in self._lent} | self._leaving
        if remaining:
            await asyncio.wait(remaining)

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


def _memory_bytes(pid: int) -> int:
    """
    Resident memory of a process's descendants; shared pages count once in each.
    """
    import psutil  # Most workers limit no memory and save this much of it: 1 MB.

    total = 0
    pending = _child_pids(pid)
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
