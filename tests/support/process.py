"""
One `asyncflow` process of a test: started, monitored, signalled, and never left behind.

Its log lines are JSON and are read as they arrive, so that a test waits for a log event instead of
sleeping. A whole deployment is in `system`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from tests.support import forked
from tests.support.waiting import PATIENCE_SECONDS

LINE_BYTES_MAX = 1024 * 1024
TAIL_LINES = 40

LogLine = dict[str, Any]


class Process:
    """
    A running process; made by `start`.

    Attributes:
        name: A readable name, such as `worker-2`.
        lines: The log lines so far, oldest first.
        output: All other output.
    """

    def __init__(self, name: str, process: ForkServerProcess, output: Connection) -> None:
        self.name = name
        self.lines: list[LogLine] = []
        self.output = ""
        self._process = process
        self._said_more = asyncio.Condition()
        self._ending = asyncio.create_task(self._wait_until_it_ends())
        self._reading = asyncio.create_task(self._read(output))

    @classmethod
    async def start(
        cls,
        name: str,
        *arguments: str,
        settings: Mapping[str, object],
        folder: Path,
        program: Sequence[str] = ("asyncflow",),
        python: Path | None = None,
    ) -> Process:
        """
        Run `asyncflow` with `arguments` in `folder`.

        Args:
            settings: Environment variables without their prefix `ASYNCFLOW_`, in any case.
            program: What to run instead: a module and its first arguments.
            python: The interpreter, if not that of the tests.
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ASYNCFLOW_")}
        given = {f"ASYNCFLOW_{k.upper()}": str(v) for k, v in settings.items()}
        module, *first = program
        process, output = forked.start(
            module,
            [*first, *arguments],
            environment={**inherited, **given},
            folder=folder,
            python=python,
        )
        return cls(name, process, output)

    @property
    def pid(self) -> int:
        """
        Its process id, which is also its group id.
        """
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """
        Whether it is still running.
        """
        return self._process.exitcode is None

    async def log_event(
        self,
        event: str,
        *,
        after: int = 0,
        timeout_seconds: float = PATIENCE_SECONDS,
        **fields: object,
    ) -> LogLine:
        """
        Wait until it has logged `event` with these fields, and return that line.

        Args:
            after: How many of `lines` to skip.
        """

        def found() -> LogLine | None:
            for line in self.lines[after:]:
                if line["event"] == event and fields.items() <= line.items():
                    return line
            return None

        return await self._wait_for(found, f"log {event} {fields}", timeout_seconds)

    async def complains(self, words: str, *, timeout_seconds: float = PATIENCE_SECONDS) -> LogLine:
        """
        Wait until it has logged an event with these words in its reason, and return that line.
        """

        def found() -> LogLine | None:
            return next((line for line in self.lines if words in line.get("reason", "")), None)

        return await self._wait_for(found, f"complain of {words!r}", timeout_seconds)

    async def _wait_for(
        self, found: Callable[[], LogLine | None], expectation: str, timeout_seconds: float
    ) -> LogLine:
        async with self._said_more:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    while found() is None and not self._reading.done():
                        await self._said_more.wait()
        line = found()
        assert line is not None, f"{self.name} did not {expectation}:\n{self.tail()}"
        return line

    def has_logged(self, event: str) -> bool:
        """
        Whether it has logged this event so far.
        """
        return any(line["event"] == event for line in self.lines)

    def send(self, number: signal.Signals) -> None:
        """
        Send it a signal.
        """
        assert self.is_running, f"{self.name} has ended:\n{self.tail()}"
        os.kill(self.pid, number)

    async def kill(self) -> None:
        """
        Kill it as a crash would, and wait until it has ended.
        """
        self.send(signal.SIGKILL)
        await self._ending

    async def exit_status(self, *, timeout_seconds: float = 20.0) -> int:
        """
        Wait for its end and its remaining output; return the exit status, or the negated number of
        the signal that killed it.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                status = await asyncio.shield(self._ending)
                await asyncio.shield(self._reading)
        except TimeoutError:
            raise AssertionError(f"{self.name} did not end:\n{self.tail()}") from None
        return status

    async def end(self) -> None:
        """
        Kill it and its process group, whatever state they are in.
        """
        self._process.kill()  # It may not be a group leader yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        await self._ending
        await self._reading

    def tail(self) -> str:
        """
        The end of its output, for a failed test.
        """
        lines = [json.dumps(line) for line in self.lines[-TAIL_LINES:]]
        return "\n".join([*lines, self.output[-4_000:]])

    async def _wait_until_it_ends(self) -> int:
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._process.sentinel, ended.set)
        await ended.wait()
        loop.remove_reader(self._process.sentinel)
        assert self._process.exitcode is not None
        return self._process.exitcode

    async def _read(self, output: Connection) -> None:
        said = asyncio.StreamReader(LINE_BYTES_MAX)
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(said), output
        )
        while text := (await said.readline()).decode(errors="replace"):
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            async with self._said_more:
                if isinstance(line, dict) and "event" in line:
                    self.lines.append(line)
                else:
                    self.output += text
                self._said_more.notify_all()
        async with self._said_more:
            self._said_more.notify_all()


async def is_gone(pid: int) -> bool:
    """
    Whether the process with this id has ended.
    """
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
