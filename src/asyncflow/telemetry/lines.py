"""
How log lines leave the process: whole, in order, and not one system call each.

On an event loop lines wait until the end of its present turn and leave together, since a busy
worker settles many attempts in one. Nothing waits longer: from a thread without a loop a line
leaves at once, an urgent one from anywhere, and each takes along what waited before it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections import deque
from typing import TextIO

from asyncflow.telemetry.streams import WRITE_BYTES_MAX


class Lines:
    """
    Writes lines to `stream`, from any thread; never raises.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: deque[str] = deque()
        # Re-entrant: while a thread writes, the garbage collector may end something that logs.
        self._flushing = threading.RLock()
        self._flusher: asyncio.AbstractEventLoop | None = None
        atexit.register(self.flush)
        os.register_at_fork(after_in_child=self._forget)

    def write(self, line: str, *, is_urgent: bool) -> None:
        """
        Write `line`, which has no end of line yet: now, or at the end of this turn of the loop.
        """
        self._waiting.append(line)
        loop = None if is_urgent else asyncio._get_running_loop()
        if loop is None:
            self.flush()
        elif self._flusher is not loop:
            # That another loop is going to flush is no help: it may be busy or closed by then.
            self._flusher = loop
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """
        Write what waits.
        """
        with self._flushing:
            # First this: a line that is appended from now on plans a flush of its own.
            self._flusher = None
            while self._waiting:
                text = self._next_write()
                with contextlib.suppress(Exception):  # a stream of somebody's own
                    self._stream.write(text)
                    self._stream.flush()

    def _next_write(self) -> str:
        lines = [self._waiting.popleft()]
        size = len(lines[0]) + 1
        while self._waiting and (size := size + len(self._waiting[0]) + 1) <= WRITE_BYTES_MAX:
            lines.append(self._waiting.popleft())
        return "\n".join(lines) + "\n"

    def _forget(self) -> None:
        # In a forked process: what waited is the parent's to write, and so is its lock to release.
        self._waiting.clear()
        self._flushing = threading.RLock()
        self._flusher = None
