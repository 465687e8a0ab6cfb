"""
A file system of a few megabytes that a test can fill and free again.

It is in memory. Mounting it needs root on Linux; otherwise its tests are skipped.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import scratch

CHUNK_BYTES = 64 * 1024


class SmallDisk:
    """
    A mounted file system of limited size.

    Attributes:
        folder: The mount point.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """
        Fill the disk to the last block.
        """
        with self._filler.open("ab", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(CHUNK_BYTES))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def fill_but(self, mebibytes: int) -> None:
        """
        Fill the disk except for `mebibytes`.
        """
        size = shutil.disk_usage(self.folder).free - mebibytes * 1024**2
        with self._filler.open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, size)

    def free(self) -> None:
        """
        Free what `fill` took.
        """
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(purpose: str, *, mebibytes: int) -> Iterator[SmallDisk]:
    """
    Mount a file system for one block, or skip the test if mounting is not permitted.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    folder = scratch.make_folder(purpose, in_memory=False)
    options = f"size={mebibytes}m,mode=0700"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: a killed process may still be closing its files.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()
