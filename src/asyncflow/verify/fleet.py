"""
The processes of a run: started, cut off from each other by wires, started again when they end.
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
    One place in the fleet; whatever process fills it.

    Attributes:
        role: api, worker or maintenance.
        wires: To `postgres` and, with a broker, to `broker`.
        clock: What it reads as the time of day, if that can go wrong.
        process: The one that runs now, or ran last.
        asked: Whether somebody of ours ended it, so that its end is no surprise.
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
        Whether there is a process.
        """
        return self.process is not None and self.process.returncode is None

    def send(self, number: signal.Signals) -> None:
        """
        Signal its process, if there is one.
        """
        if self.process is not None and self.is_running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


class Fleet:
    """
    All members of a run.

    Args:
        folder: Where they run; logs go to its `logs`, histories to its `history`.
        settings: For every process, by the names of `Settings`.
        mutant: A known bug for every process; None is AsyncFlow as it is.
        clocks: A folder for clocks that can be made wrong; None leaves all of them right.
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
        Make room for a process that runs `asyncflow` with `arguments`.
        """
        given = {f"{PREFIX}{k.upper()}": str(v) for k, v in settings.items()}
        member = Member(name, arguments[0], [*arguments], {**self._settings, **given}, wires)
        if self._clocks is not None:
            member.clock = Clock(self._clocks / name)
        self.members.append(member)
        return member

    def of(self, role: str) -> list[Member]:
        """
        The members of one role.
        """
        return [member for member in self.members if member.role == role]

    def start(self) -> None:
        """
        Start everybody, and again whoever ends.
        """
        self._keeping = [asyncio.create_task(self._keep(member)) for member in self.members]

    async def stop(self, *, grace_seconds: float) -> None:
        """
        Ask everybody to stop; kill, and write down, who does not within the grace period.
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
        Leave nobody behind.
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
                # Held open by us alone: should we die, they stop.
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
