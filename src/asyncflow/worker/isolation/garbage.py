"""
Collects cyclic garbage when memory has grown, and not only when many objects are new.

Python's collector counts objects and knows nothing of their size. An exception that its own
handler keeps (`except ValueError as error: kept = error`) is a cycle of a few objects, which may
hold megabytes of local variables: hundreds of them pile up before the count is full. So memory
is checked when attempts end, and growth triggers a collection.

Most of what piles up is young, and a collection of the two young generations takes little time
whatever the program holds. A full one takes time in proportion to all of it. It follows only if
the young one was not enough, and only when memory has grown by a quarter since the last.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable

GROWTH_BYTES = 32 << 20
"""How much more memory than after the last collection is a reason for the next one."""

CHECK_SECONDS = 0.02
"""A check costs some microseconds; attempts may end every ten."""

COLLECT_SECONDS = 60.0
"""Garbage may hold other things than memory, sockets above all; so it does not stay for longer."""

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """
    How much memory this process holds.
    """
    if sys.platform == "linux":
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * PAGE_BYTES
    import psutil

    return int(psutil.Process().memory_info().rss)


OLDEST = 2


def collect(generation: int) -> None:
    """
    Collect a generation and those younger. After the oldest, also have the C library give free
    pages back to the system, which it keeps where threads allocated them.
    """
    gc.collect(generation)
    if generation == OLDEST:
        import ctypes  # rarely needed

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
        if trim is not None:
            trim(0)


class Garbage:
    """
    Watches the memory of one process. Belongs to the thread that runs attempts, or settles them.

    Args:
        resident: How many bytes of memory are held.
        collect: Collects a generation and those younger.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        *,
        resident: Callable[[], int] = resident_bytes,
        collect: Callable[[int], object] = collect,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._resident = resident
        self._collect = collect
        self._clock = clock
        self._check_at = 0.0
        self._collect_at = clock() + COLLECT_SECONDS
        bytes_held = resident()
        self._young_bytes_max = bytes_held + GROWTH_BYTES
        self._bytes_max = bytes_held + _growth(bytes_held)

    def check(self) -> None:
        """
        Collect if memory has grown enough. Call it often: most calls only read the clock.
        """
        now = self._clock()
        if now < self._check_at:
            return
        self._check_at = now + CHECK_SECONDS
        try:
            self._collect_if_grown(now)
        except OSError:
            # No file descriptor is left to ask with. The next check asks again.
            return

    def _collect_if_grown(self, now: float) -> None:
        bytes_held = self._resident()
        if bytes_held > self._young_bytes_max or now > self._collect_at:
            bytes_held = self._collected()
            self._collect_at = now + COLLECT_SECONDS
            self._young_bytes_max = bytes_held + GROWTH_BYTES
        # Memory that was given back need not be reached again before the next collection.
        self._young_bytes_max = min(self._young_bytes_max, bytes_held + GROWTH_BYTES)
        self._bytes_max = min(self._bytes_max, bytes_held + _growth(bytes_held))

    def _collected(self) -> int:
        self._collect(1)
        bytes_held = self._resident()
        if bytes_held > self._bytes_max:
            self._collect(OLDEST)
            bytes_held = self._resident()
            self._bytes_max = bytes_held + _growth(bytes_held)
        return bytes_held


def _growth(bytes_held: int) -> int:
    return max(GROWTH_BYTES, bytes_held // 4)
