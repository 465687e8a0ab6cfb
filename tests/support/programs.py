"""
Running `asyncflow` as a user would: as a program, in a folder, with an environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from asyncflow.stopping import ECHO_SECONDS

PATIENCE_SECONDS = 60.0


class Program:
    """
    A running `asyncflow …` whose output, including standard error, is read line by line.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._family: set[psutil.Process] = set()
        self._more = threading.Condition()
        self._ended = False
        self.reading = threading.Thread(target=self._read)
        self.reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._more:
                    self.lines.append(line.rstrip("\n"))
                    self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    @property
    def output(self) -> str:
        """
        The output so far.
        """
        return "\n".join(self.lines)

    def until(self, pattern: str, *, times: int = 1) -> re.Match[str]:
        """
        Wait for the `times`th line that matches, and return the match.
        """
        found: list[re.Match[str]] = []

        def is_there() -> bool:
            found[:] = [match for line in self.lines if (match := re.search(pattern, line))]
            return self._ended or len(found) >= times

        with self._more:
            assert self._more.wait_for(is_there, PATIENCE_SECONDS), self.output
        assert len(found) >= times, f"It ended without {pattern!r}:\n{self.output}"
        return found[times - 1]

    def send(self, number: signal.Signals) -> None:
        """
        Send a signal to the parent only.
        """
        self.family()
        self.process.send_signal(number)

    def send_until(self, number: signal.Signals, pattern: str) -> None:
        """
        Repeat a signal until a line matches: the first few may be ignored as echoes of an earlier
        one.
        """
        with self._more:
            while not (self._ended or any(re.search(pattern, line) for line in self.lines)):
                self.process.send_signal(number)
                self._more.wait(ECHO_SECONDS)
        self.until(pattern)

    def ended(self) -> int:
        """
        Wait until it ends and return the exit status.
        """
        status = self.process.wait(PATIENCE_SECONDS)
        with self._more:
            assert self._more.wait_for(lambda: self._ended, PATIENCE_SECONDS), self.output
        return status

    def family(self) -> list[psutil.Process]:
        """
        All its descendant processes so far; remembered for `survivors`.
        """
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family.update(psutil.Process(self.process.pid).children(recursive=True))
        return list(self._family)

    def child(self, command: str) -> psutil.Process:
        """
        The process that runs `asyncflow <command>`.
        """
        (child,) = [each for each in self.family() if _runs(each, command)]
        return child

    def survivors(self) -> list[psutil.Process]:
        """
        Which of the family are still running after all had time to end.
        """
        _, alive = psutil.wait_procs(self.family(), timeout=PATIENCE_SECONDS)
        return alive


def _runs(process: psutil.Process, command: str) -> bool:
    try:
        arguments = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    return "asyncflow" in arguments and command in arguments


def environment(**settings: object) -> dict[str, str]:
    """
    Our environment without any AsyncFlow settings, plus these.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ASYNCFLOW_")}
    return {**kept, **{f"ASYNCFLOW_{name.upper()}": str(value) for name, value in settings.items()}}


@contextlib.contextmanager
def running(*arguments: str, folder: Path, env: Mapping[str, str]) -> Iterator[Program]:
    """
    Run `asyncflow <arguments>`; kill it at the end of the block if it is still running.
    """
    program = Program(
        subprocess.Popen(
            [sys.executable, "-m", "asyncflow", *arguments],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    )
    try:
        yield program
    finally:
        family = program.family()
        program.process.kill()
        program.process.wait()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS)
        for process in alive:
            process.kill()
        program.reading.join()


def finished(
    *arguments: str, folder: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """
    Run `asyncflow <arguments>` to its end.
    """
    return subprocess.run(
        [sys.executable, "-m", "asyncflow", *arguments],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
