"""
Folders for the data of the test servers.

PostgreSQL's data is in memory if there is room: copying a database costs a tenth of what it costs
on disk. The server still syncs, and loses no more when it is killed. RabbitMQ's data is on disk:
the benchmarks use the same brokers, and memory would flatter their results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil

PREFIX = "asyncflowtest"
MEMORY = Path("/dev/shm")
FREE_BYTES_MIN = 2 * 1024**3


def make_folder(purpose: str, *, in_memory: bool) -> Path:
    """
    Create an empty folder with a short path, as a Unix socket needs; the caller removes it.

    Args:
        in_memory: Use memory if this system has enough to spare.
    """
    place = MEMORY if in_memory and _has_room() else Path(tempfile.gettempdir())
    _remove_leftovers(place)
    return Path(tempfile.mkdtemp(prefix=f"{PREFIX}-{os.getpid()}-{purpose}-", dir=place))


def _has_room() -> bool:
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        return False
    return shutil.disk_usage(MEMORY).free >= FREE_BYTES_MIN


def _remove_leftovers(place: Path) -> None:
    # A killed test run cannot clean up, so its memory stays in use until this removes it.
    for folder in place.glob(f"{PREFIX}-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            if folder.is_mount():  # See `disk`.
                subprocess.run(["umount", "--lazy", str(folder)], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)
