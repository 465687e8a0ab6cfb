"""
A wall clock that is wrong, for one process of a run.

What libfaketime does to any program is done here to ours alone, so that nothing needs to be
installed: before anything of AsyncFlow is loaded, the functions of `time` that tell the time of
day are replaced by others that add an offset. The offset lies in a page that the process and
the nemesis share, so the clock of a running process can jump. The process writes into the same
page what it read last, and how often: that is the evidence that it goes by the wrong clock.

The monotonic clock is left alone, because no administrator and no NTP changes it.
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
# Words of the page: the offset, written by the nemesis; how many times the process read its clock,
# and what it showed, written by the process. In nanoseconds.
OFFSET, READINGS, SHOWN = 0, 8, 16
PAGE_BYTES = 24
WORD = struct.Struct("=q")


class Clock:
    """
    One process's wrong clock, seen from outside.

    Args:
        file: The page; made anew, right to begin with.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(bytes(PAGE_BYTES))
        self._page = _page(file)

    def set(self, offset_seconds: float) -> None:
        """
        Let it be wrong by this much from now on; negative is behind.
        """
        WORD.pack_into(self._page, OFFSET, int(offset_seconds * NANOS))

    @property
    def readings(self) -> int:
        """
        How often the process has read it.
        """
        return int(WORD.unpack_from(self._page, READINGS)[0])

    @property
    def shown_seconds(self) -> float:
        """
        What it showed when it was read last, in seconds since 1970.
        """
        return int(WORD.unpack_from(self._page, SHOWN)[0]) / NANOS


def plant(file: Path) -> None:
    """
    Let `time.time` and `time.time_ns` of this process read the clock of this page.

    Call it before AsyncFlow is loaded, some of which takes hold of these functions at once.
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
    Let `datetime.now` of one module go by `time.time`.

    A type of C cannot be changed, and replacing it everywhere would confuse whoever asks for it.
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
