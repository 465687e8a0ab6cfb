"""
Keeps several processes of ours running under one parent: `asyncflow dev`, and a worker with
`--processes`.

A child that ends unasked is started again, with a growing pause. A child that refuses to run
(exit status 2: its settings, schema or handlers are wrong) has said why, and ends the whole.

The first SIGINT, SIGTERM or SIGHUP asks all children to stop, later ones hurry them. Each
child reads from a pipe that only the parent holds open; if the parent is killed, however
suddenly, the pipe ends and the child stops as if it had been asked to.
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
"""A child that ran this long was well; its next restart is a quick one again."""

KILL_SECONDS = 15.0
"""How long beyond their grace period children may take to stop before they are killed."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CHILD_OPTION = "--stop-with-parent"
"""Before the command: this process was started by a supervisor."""


@dataclass(slots=True)
class SupervisedProcess:
    """
    One supervised process.

    Attributes:
        role: What it is, for people.
        arguments: Of `asyncflow`, for example ("worker", "--queues", "video").
        environment: Added to the parent's; the place for what others must not read, since
            arguments are public.
        process: The running one; None before the first.
    """

    role: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None


class Supervisor:
    """
    Receives the signals to stop from `with` on, and runs children until one came.

    Args:
        grace_seconds: How long after the first signal the children may take, plus a
            margin, before they are killed.
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
        Ask the children to stop; asked again, hurry them.
        """
        self.stopping.set()
        for child in self._children:
            _terminate(child)

    async def run(self, children: Sequence[SupervisedProcess]) -> int:
        """
        Run the children until all have ended; return the exit status of the whole.

        Returns:
            0 if all ended well after they were asked to stop, 2 if one refused to run, 1 if
            one had to be killed or failed while it stopped.
        """
        self._children = children
        keeping = [asyncio.create_task(self._keep(child)) for child in children]
        statuses = []
        for task in asyncio.as_completed(keeping):
            statuses.append(await task)
            if not self.stopping.is_set():
                # Without the one that ended, the rest makes no sense.
                self.stop()
        return ExitStatus.REFUSED if ExitStatus.REFUSED in statuses else int(any(statuses))

    async def _keep(self, child: SupervisedProcess) -> int:
        """
        Run one child again and again until it stops for good; return its last status.
        """
        pauses = Delays(PAUSE_SECONDS_MIN, longest=PAUSE_SECONDS_MAX, jitter=0.0)
        while not self.stopping.is_set():
            started = time.monotonic()
            try:
                child.process = await _start(child)
            except OSError as error:
                # No memory or no more processes, for the moment.
                await self._pause(child.role, 0, str(error), pauses.next())
                continue
            if self.stopping.is_set():
                _terminate(child)
            status = await self._wait(child.process)
            if self.stopping.is_set() and status == -signal.SIGTERM:
                return 0  # It was too young to know what the signal meant.
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
        # -P: modules in the current folder must not take the place of Python's own.
        *("-P", "-m", "asyncflow", CHILD_OPTION),
        *child.arguments,
        env={**os.environ, **child.environment},
        stdin=asyncio.subprocess.PIPE,
        # The terminal's Ctrl-C goes to the parent alone, which passes it on once.
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
    The variables that give a child these settings.
    """
    # All of them, not those that differ from the defaults: an option may say the default again
    # where the inherited environment says something else.
    return {PREFIX + name.upper(): _as_text(value) for name, value in asdict(settings).items()}


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def stop_with_parent() -> None:
    """
    In a supervised child: send ourselves a SIGTERM when the parent is gone.
    """
    pipe = os.dup(sys.stdin.fileno())
    # What handlers start inherits standard input; they shall find it empty, not waiting.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, sys.stdin.fileno())
    os.close(nothing)
    threading.Thread(target=_watch_parent, args=[pipe], daemon=True, name="parent").start()


def _watch_parent(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
