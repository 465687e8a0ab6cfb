"""
A wrong wall clock for one process of a run.

This does for AsyncFlow what libfaketime does for any program, without an installation: before
AsyncFlow is imported, the functions of `time` that read the wall clock are replaced with ones that
add an offset. The offset is in a memory page that the process shares with the nemesis, so the
clock of a running process can jump. The process writes to the same page what it read last and how
often, as evidence that it uses the wrong clock.

The monotonic clock stays right, because neither administrators nor NTP change it.
"""

from __future__ import annotations

import mmap
import struct
import time
from datetime import datetime, tzinfo
from pathlib import Path
from types import ModuleType
from typing import Self

NANOS = 1_000_000_000
# Words of the page: the offset, written by the nemesis; the number of readings and the last value
# read, written by the process. In nanoseconds.
OFFSET, READINGS, SHOWN = 0, 8, 16
PAGE_BYTES = 24
WORD = struct.Struct("=q")


class Clock:
    """
    The clock of one process, seen from outside; right until it is set.

    Args:
        file: The page; replaced if it exists.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(bytes(PAGE_BYTES))
        self._page = _page(file)

    def set(self, offset_seconds: float) -> None:
        """
        Set the offset; negative is behind.
        """
        WORD.pack_into(self._page, OFFSET, int(offset_seconds * NANOS))

    @property
    def readings(self) -> int:
        """
        How often the process has read the clock.
        """
        return int(WORD.unpack_from(self._page, READINGS)[0])

    @property
    def shown_seconds(self) -> float:
        """
        The last value read, in seconds since 1970.
        """
        return int(WORD.unpack_from(self._page, SHOWN)[0]) / NANOS


def plant(file: Path) -> None:
    """
    Make `time.time` and `time.time_ns` of this process read the clock of this page.

    To be called before AsyncFlow is imported, because some modules bind these functions on import.
    """
    page, true_time_ns = _page(file), time.time_ns

    def time_ns() -> int:
        shown = true_time_ns() + int(WORD.unpack_from(page, OFFSET)[0])
        WORD.pack_into(page, READINGS, int(WORD.unpack_from(page, READINGS)[0]) + 1)
        WORD.pack_into(page, SHOWN, shown)
        return shown

    def time_() -> float:
        return time_ns() / NANOS

    _replace(time, "time_ns", time_ns)
    _replace(time, "time", time_)


def plant_in(module: ModuleType) -> None:
    """
    Make `datetime.now` of one module use `time.time`.

    A C type cannot be patched, and replacing it everywhere would break `isinstance` checks.
    """

    class Datetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp(time.time(), tz)

    _replace(module, "datetime", Datetime)


def _replace(module: ModuleType, name: str, value: object) -> None:
    setattr(module, name, value)


def _page(file: Path) -> mmap.mmap:
    with file.open("r+b") as opened:
        return mmap.mmap(opened.fileno(), PAGE_BYTES)
