"""
Starts the processes of a measurement, samples their resource usage, and stops them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

STOP_SECONDS_MAX = 3.0


class Processes:
    """
    Processes that run concurrently, with all their children.

    Attributes:
        started_at: When the first one was started, as a `time.perf_counter` value.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], *, environment: Mapping[str, str], log: Path
    ) -> None:
        self.started_at = time.perf_counter()
        with log.open("ab") as output:
            self._roots = [
                subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                for command in commands
            ]

    @property
    def pids(self) -> list[int]:
        """
        The ids of the started processes, without their children.
        """
        return [root.pid for root in self._roots]

    def check(self) -> None:
        """
        Return if all still run.

        Raises:
            RuntimeError: A process has exited on its own; its log says why.
        """
        for root in self._roots:
            if root.poll() is not None:
                raise RuntimeError(f"{root.args!r} ended by itself with {root.returncode}")

    def cpu_seconds(self) -> float:
        """
        CPU time of all processes since their start.
        """
        return sum(tree_cpu_seconds(root.pid) for root in self._roots if root.poll() is None)

    def memory_mb(self) -> dict[str, float]:
        """
        Resident and unshared memory of all processes, in MiB.
        """
        rss = uss = 0.0
        for process in self._tree():
            usage = process.memory_full_info()
            rss += usage.rss / 2**20
            uss += usage.uss / 2**20
        return {"rss_mb": round(rss, 1), "uss_mb": round(uss, 1)}

    def stop(self) -> None:
        """
        Ask the processes to stop, and kill those that do not.
        """
        tree = self._tree()
        for root in self._roots:
            if root.poll() is None:
                root.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(tree, timeout=STOP_SECONDS_MAX)
        for process in alive:
            process.kill()
        for root in self._roots:
            root.wait()

    def _tree(self) -> list[psutil.Process]:
        tree: list[psutil.Process] = []
        for root in self._roots:
            if root.poll() is None:
                process = psutil.Process(root.pid)
                tree += [process, *process.children(recursive=True)]
        return tree


@contextmanager
def running(
    commands: Sequence[Sequence[str]], *, environment: Mapping[str, str], log: Path
) -> Iterator[Processes]:
    """
    Run processes until the end of the block.
    """
    processes = Processes(commands, environment=environment, log=log)
    try:
        yield processes
    finally:
        processes.stop()


def tree_cpu_seconds(pid: int | None) -> float:
    """
    CPU time of a process and all its descendants, including those that have exited.
    """
    if pid is None:
        return 0.0
    total = 0.0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            # The last two fields are the times of exited children.
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total
