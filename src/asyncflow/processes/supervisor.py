"""
Keeps several processes running under one parent, for `asyncflow dev` and for a worker with
`--processes`.

A child that ends unexpectedly is restarted, with a growing delay. A child that refuses to run
(exit status 2: its settings, schema or handlers are wrong) has logged why, and ends all others.

The first SIGINT, SIGTERM or SIGHUP asks all children to stop, later ones make them quit
immediately. Each child reads from a pipe that only the parent holds open; if the parent is
killed, the pipe ends and the child stops as on a signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Self

from asyncflow.aio.waiting import Delays, set_within
from asyncflow.errors import ExitStatus
from asyncflow.settings import PREFIX, Settings
from asyncflow.stopping import signals
from asyncflow.telemetry import events

PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.25, 10.0
STEADY_SECONDS = 10.0
"""After a child has run this long, its next restart is a quick one again."""

KILL_SECONDS = 15.0
"""How long after their grace period children are killed."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CHILD_OPTION = "--stop-with-parent"
"""Given before the command: a supervisor started this process."""


@dataclass(slots=True)
class SupervisedProcess:
    """
    One supervised process.

    Attributes:
        role: Its name in logs.
        arguments: Arguments of `asyncflow`, for example ("worker", "--queues", "video").
        environment: Added to the parent's. Secrets belong here, because other users can read
            arguments.
        process: The running process; None before the first.
    """

    role: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None


class Supervisor:
    """
    Receives signals inside its `with` block, and runs children until one comes.

    Args:
        grace_seconds: How long after the first signal the children may take to stop; after a
            margin of `KILL_SECONDS` they are killed.
    """

    def __init__(self, *, grace_seconds: float) -> None:
        self.stopping = asyncio.Event()
        self._grace_seconds = grace_seconds
        self._signals = contextlib.ExitStack()
        self._children: Sequence[SupervisedProcess] = ()

    def __enter__(self) -> Self:
        self._signals.enter_context(signals(lambda _: self.stop(), numbers=STOP_SIGNALS))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._signals.close()

    def stop(self) -> None:
        """
        Ask the children to stop; the second call makes them quit immediately.
        """
        self.stopping.set()
        for child in self._children:
            _terminate(child)

    async def run(self, children: Sequence[SupervisedProcess]) -> int:
        """
        Run the children until all have ended; return the exit status of the parent.

        Returns:
            0 if all stopped when asked, 2 if one refused to run, 1 if one failed or was killed
            while it stopped.
        """
        self._children = children
        keeping = [asyncio.create_task(self._keep(child)) for child in children]
        statuses = []
        for task in asyncio.as_completed(keeping):
            statuses.append(await task)
            if not self.stopping.is_set():
                # The others are of no use without the one that ended.
                self.stop()
        return ExitStatus.REFUSED if ExitStatus.REFUSED in statuses else int(any(statuses))

    async def _keep(self, child: SupervisedProcess) -> int:
        """
        Run one child, restart it until it stops for good, and return its last status.
        """
        pauses = Delays(PAUSE_SECONDS_MIN, longest=PAUSE_SECONDS_MAX, jitter=0.0)
        while not self.stopping.is_set():
            started = time.monotonic()
            try:
                child.process = await _start(child)
            except OSError as error:
                # No memory or no more processes at the moment.
                await self._pause(child.role, 0, str(error), pauses.next())
                continue
            if self.stopping.is_set():
                _terminate(child)
            status = await self._wait(child.process)
            if self.stopping.is_set() and status == -signal.SIGTERM:
                return 0  # The signal came before its handlers were set.
            if self.stopping.is_set() or status in (0, ExitStatus.REFUSED):
                return status
            if time.monotonic() - started > STEADY_SECONDS:
                pauses.reset()
            await self._pause(child.role, child.process.pid, _in_words(status), pauses.next())
        return 0

    async def _pause(self, role: str, pid: int, status: str, seconds: float) -> None:
        events.child_process_ended(role=role, pid=pid, status=status, restart_seconds=seconds)
        await set_within(self.stopping, seconds)

    async def _wait(self, process: asyncio.subprocess.Process) -> int:
        ended = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self.stopping.wait())
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.cancel():
            await asyncio.wait({ended}, timeout=self._grace_seconds + KILL_SECONDS)
        if not ended.done():
            process.kill()
        return await ended


async def _start(child: SupervisedProcess) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        # -P: modules in the current folder must not shadow Python's own.
        *("-P", "-m", "asyncflow", CHILD_OPTION),
        *child.arguments,
        env={**os.environ, **child.environment},
        stdin=asyncio.subprocess.PIPE,
        # The terminal's Ctrl-C reaches only the parent, which passes it on once.
        start_new_session=True,
    )


def _terminate(child: SupervisedProcess) -> None:
    if child.process is not None and child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.terminate()


def _in_words(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def as_environment(settings: Settings) -> dict[str, str]:
    """
    The environment variables that give a child these settings.
    """
    # All of them, not only those that differ from the defaults: an option may restore a default
    # that the inherited environment overrides.
    return {PREFIX + name.upper(): _as_text(value) for name, value in asdict(settings).items()}


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def stop_with_parent() -> None:
    """
    In a supervised child: send this process a SIGTERM when the parent is gone.
    """
    pipe = os.dup(sys.stdin.fileno())
    # Programs that handlers start inherit standard input; it must be empty rather than block.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    threading.Thread(target=_watch_parent, args=[pipe], daemon=True, name="parent").start()


def _watch_parent(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
