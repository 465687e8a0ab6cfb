"""
The processes of a run, each behind its own proxies, restarted when they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from asyncflow.processes.supervisor import CHILD_OPTION
from asyncflow.settings import PREFIX
from asyncflow.verify.clock import Clock
from asyncflow.verify.history import History
from asyncflow.verify.process import RIGHT
from asyncflow.verify.proxy import Proxy

RESTART_SECONDS = 0.3
HANDLERS = "asyncflow.verify.handlers"


@dataclass(slots=True)
class Member:
    """
    One process of the fleet, and those that replace it.

    Attributes:
        role: api, worker or maintenance.
        wires: Its proxies to `postgres` and, with a broker, to `broker`.
        clock: Its wall clock, if that can be set wrong.
        process: The process that runs now, or ran last.
        asked: Whether the run itself ended it, so that its end is expected.
    """

    name: str
    role: str
    arguments: list[str]
    environment: dict[str, str]
    wires: dict[str, Proxy] = field(default_factory=dict)
    clock: Clock | None = None
    process: asyncio.subprocess.Process | None = None
    asked: bool = False

    @property
    def is_running(self) -> bool:
        """
        Whether a process is running.
        """
        return self.process is not None and self.process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """
        Send its process a signal, if there is one.
        """
        if self.process is not None and self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Fleet:
    """
    All members of a run.

    Args:
        folder: Their working directory; logs go to its `logs`, histories to its `history`.
        settings: The settings of every process, by the names of `Settings`.
        mutant: A known bug of every process; None for none.
        clocks: A folder for clocks that can be set wrong; None leaves all of them right.
    """

    def __init__(
        self,
        folder: Path,
        history: History,
        *,
        settings: Mapping[str, object],
        mutant: str | None,
        clocks: Path | None,
    ) -> None:
        self.members: list[Member] = []
        self._folder = folder
        self._history = history
        self._settings = {f"{PREFIX}{k.upper()}": str(v) for k, v in settings.items()}
        self._mutant = mutant
        self._clocks = clocks
        self._keeping: list[asyncio.Task[None]] = []
        self._stopping = False

    def add(
        self, name: str, *arguments: str, wires: dict[str, Proxy], **settings: object
    ) -> Member:
        """
        Add a process that runs `asyncflow` with `arguments`.
        """
        given = {f"{PREFIX}{k.upper()}": str(v) for k, v in settings.items()}
        member = Member(name, arguments[0], [*arguments], {**self._settings, **given}, wires)
        if self._clocks is not None:
            member.clock = Clock(self._clocks / name)
        self.members.append(member)
        return member

    def of(self, role: str) -> list[Member]:
        """
        The members with one role.
        """
        return [member for member in self.members if member.role == role]

    def start(self) -> None:
        """
        Start all members, and restart each that ends.
        """
        self._keeping = [asyncio.create_task(self._keep(member)) for member in self.members]

    async def stop(self, *, grace_seconds: float) -> None:
        """
        Ask all members to stop; kill, and record, those that exceed the grace period.
        """
        self._stopping = True
        for member in self.members:
            member.asked = True
            member.send(signal.SIGTERM)
        if self._keeping:
            _, late = await asyncio.wait(self._keeping, timeout=grace_seconds)
            if late:
                for member in self.members:
                    member.send(signal.SIGKILL)
                await asyncio.wait(late)
        for task in self._keeping:
            task.result()

    async def kill(self) -> None:
        """
        Kill all members and close their proxies.
        """
        self._stopping = True
        for member in self.members:
            member.send(signal.SIGCONT)
            member.send(signal.SIGKILL)
        await asyncio.gather(*self._keeping, return_exceptions=True)
        for member in self.members:
            for wire in member.wires.values():
                await wire.close()

    async def _keep(self, member: Member) -> None:
        while not self._stopping:
            member.asked = False
            member.process = process = await self._run(member)
            self._history.write("process.started", who=member.name, pid=process.pid)
            status = await process.wait()
            self._history.write(
                "process.ended",
                who=member.name,
                pid=process.pid,
                status=status,
                asked=member.asked,
                final=self._stopping,
            )
            if not self._stopping:
                await asyncio.sleep(RESTART_SECONDS)

    async def _run(self, member: Member) -> asyncio.subprocess.Process:
        clock = RIGHT if member.clock is None else str(member.clock.file)
        program = ("asyncflow.verify.process", clock, self._mutant or RIGHT)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
        with (self._folder / "logs" / f"{member.name}.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", *program, CHILD_OPTION, *member.arguments),
                cwd=self._folder,
                env={**inherited, **member.environment},
                # Held open only by this process: if it dies, they stop.
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
