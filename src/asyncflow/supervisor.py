"""
Keeps several processes of ours running under one parent: `asyncflow dev`, and a worker with
`--processes`.

A child that ends unasked is started again, with a growing pause. The first SIGINT or SIGTERM
asks all children to stop, the second is passed on to hurry them. If the parent is killed, the
children get a parent-death signal on Linux and stop in good order.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from asyncflow.telemetry import events

PAUSE_SECONDS_MAX = 10.0
STEADY_SECONDS = 10.0
KILL_SECONDS = 15.0
PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class Child:
    """
    One supervised process.

    Attributes:
        role: What it is, for people.
        arguments: Of `asyncflow`, for example ("worker", "--queues", "video").
        environment: Added to the parent's.
    """

    role: str
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None


async def supervise(children: Sequence[Child], *, grace_seconds: float) -> int:
    """
    Run the children until a signal, then until all have ended; return the exit status.

    Args:
        grace_seconds: How long after the first signal the children may take, plus a
            margin, before they are killed.
    """
    supervisor = _Supervisor(children, grace_seconds)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, supervisor.receive, number)
    return await supervisor.run()


class _Supervisor:
    def __init__(self, children: Sequence[Child], grace_seconds: float) -> None:
        self._children = children
        self._grace_seconds = grace_seconds
        self._stopping = asyncio.Event()

    def receive(self, received: signal.Signals) -> None:
        self._stopping.set()
        for child in self._children:
            _send(child, received)

    async def run(self) -> int:
        keeping = [asyncio.create_task(self._keep(child)) for child in self._children]
        failed = False
        for task in asyncio.as_completed(keeping):
            failed |= not await task
            if not self._stopping.is_set():
                # A child refuses to run at all; without it the rest makes no sense.
                self.receive(signal.SIGTERM)
        return 1 if failed else 0

    async def _keep(self, child: Child) -> bool:
        """
        Run one child again and again; True if it ended well after it was asked to.
        """
        pause_seconds = 0.25
        while True:
            started = time.monotonic()
            child.process = await _start(child)
            status = await self._wait(child.process)
            if self._stopping.is_set():
                return status == 0
            if status in (0, 2):
                # It ended on purpose: done, or refused its settings and said why.
                return status == 0
            if time.monotonic() - started > STEADY_SECONDS:
                pause_seconds = 0.25
            events.child_process_ended(
                role=child.role,
                pid=child.process.pid,
                status=_in_words(status),
                restart_seconds=pause_seconds,
            )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds):
                    await self._stopping.wait()
                    return True
            pause_seconds = min(PAUSE_SECONDS_MAX, 2 * pause_seconds)

    async def _wait(self, process: asyncio.subprocess.Process) -> int:
        ended = asyncio.ensure_future(process.wait())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait({ended, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.cancel():
            await asyncio.wait({ended}, timeout=self._grace_seconds + KILL_SECONDS)
        if not ended.done():
            process.kill()
        return await ended


async def _start(child: Child) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "asyncflow",
        *child.arguments,
        env={**os.environ, **child.environment},
        # The terminal's Ctrl-C goes to the parent alone, which passes it on once.
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _send(child: Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            child.process.send_signal(number)


def _in_words(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
