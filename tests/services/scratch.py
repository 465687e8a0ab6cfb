"""
Where the servers of the tests keep their data: in memory where there is room, else on disk.

The servers sync as always, and a killed process loses nothing in memory either. What is
left out is only the waiting for a disk that others use as well.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
FREE_BYTES_MIN = 2 * 1024**3


def make_folder(purpose: str) -> Path:
    """
    Make an empty folder with a short path, as a Unix socket needs; the caller removes it.
    """
    return Path(tempfile.mkdtemp(prefix=f"asyncflow-{purpose}-", dir=_place()))


def _place() -> Path | None:
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        return None
    return MEMORY if shutil.disk_usage(MEMORY).free >= FREE_BYTES_MIN else None
