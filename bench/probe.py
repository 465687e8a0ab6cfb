"""
Counts handler calls and keeps latencies in a file that all processes map into memory.

A handler calls `hit` as its first statement. That costs about a microsecond - one reading
of the clock, one lock, two stores - and is the same for every system. The clock is
CLOCK_MONOTONIC, which all processes of a machine share.

The file holds a slot per process, written by that process alone, then an array of latencies, one
per numbered task.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import time
from pathlib import Path
from typing import NamedTuple

from bench.addresses import PROBE

SLOTS = 64
LATENCIES = 200_000
SLOT = struct.Struct("<QQdd")
FIRST_LATENCY = SLOTS * SLOT.size
SIZE = FIRST_LATENCY + 8 * LATENCIES


class Slot(NamedTuple):
    """
    The record of one process: its handler calls, and the times of the first and last one.
    """

    pid: int
    calls: int
    first: float
    last: float


class Probe:
    """
    The file as seen by the measuring process.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_bytes(bytes(SIZE))
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), SIZE)

    def reset(self) -> None:
        """
        Clear the file; only while no worker runs.
        """
        self._memory[:] = bytes(SIZE)

    def slots(self) -> list[Slot]:
        """
        One entry per process that has run a handler.
        """
        slots = [Slot(*SLOT.unpack_from(self._memory, i * SLOT.size)) for i in range(SLOTS)]
        return [slot for slot in slots if slot.pid]

    def calls(self) -> int:
        """
        Number of handler calls so far, over all processes.
        """
        return sum(slot.calls for slot in self.slots())

    def latencies(self, first: int, last: int) -> list[float]:
        """
        Seconds from submission to start of the tasks numbered `first` to `last - 1`; those
        that have not started are missing.
        """
        values = struct.unpack_from(f"<{last - first}d", self._memory, FIRST_LATENCY + 8 * first)
        return [value for value in values if value > 0]


class Writer:
    """
    The file as seen by a process that runs handlers; opened at its first call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._offset = 0
        self._calls = 0

    def hit(self, number: int, submitted_at: float) -> None:
        """
        Count a call; see the function `hit`.
        """
        now = time.perf_counter()
        with self._lock:
            if self._pid != os.getpid():
                self._take_slot(now)
            self._calls += 1
            struct.pack_into("<Q", self._memory, self._offset + 8, self._calls)
            struct.pack_into("<d", self._memory, self._offset + 24, now)
        if number >= 0:
            struct.pack_into("<d", self._memory, FIRST_LATENCY + 8 * number, now - submitted_at)

    def _take_slot(self, now: float) -> None:
        # Also after a fork: the child needs its own slot.
        with open(os.environ[PROBE], "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), SIZE)
            fcntl.lockf(file, fcntl.LOCK_EX)
            for offset in range(0, FIRST_LATENCY, SLOT.size):
                if SLOT.unpack_from(self._memory, offset)[0] == 0:
                    self._pid, self._offset, self._calls = os.getpid(), offset, 0
                    SLOT.pack_into(self._memory, offset, self._pid, 0, now, now)
                    return
        raise RuntimeError("More processes ran handlers than the probe has slots for.")


_writer = Writer()


def hit(number: int = -1, submitted_at: float = 0.0) -> None:
    """
    Count one handler call and, if `number` is 0 or more, record how long after `submitted_at` it
    came.
    """
    _writer.hit(number, submitted_at)
