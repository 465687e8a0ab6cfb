"""
Writes log lines whole and in order, without one system call for each.

Lines from an event loop are written together at the end of its current turn, because a busy
worker settles many attempts in one turn. A line from a thread without a loop and an urgent line are
written immediately, together with all that wait.
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
        # Re-entrant: while a thread writes, the garbage collector may run code that logs.
        self._flushing = threading.RLock()
        self._flusher: asyncio.AbstractEventLoop | None = None
        atexit.register(self.flush)
        os.register_at_fork(after_in_child=self._forget)

    def write(self, line: str, *, is_urgent: bool) -> None:
        """
        Write `line`, given without its newline, now or at the end of this turn of the loop.
        """
        self._waiting.append(line)
        loop = None if is_urgent else asyncio._get_running_loop()
        if loop is None:
            self.flush()
        elif self._flusher is not loop:
            # Another loop's planned flush is not enough: it may be busy or closed by then.
            self._flusher = loop
            loop.call_soon(self.flush)

    def flush(self) -> None:
        """
        Write all waiting lines.
        """
        with self._flushing:
            # Reset this first: a line appended from now on must plan a flush of its own.
            self._flusher = None
            while self._waiting:
                text = self._next_write()
                with contextlib.suppress(Exception):  # the stream may be a user's
                    self._stream.write(text)
                    self._stream.flush()

    def _next_write(self) -> str:
        lines = [self._waiting.popleft()]
        size = len(lines[0]) + 1
        while self._waiting and (size := size + len(self._waiting[0]) + 1) <= WRITE_BYTES_MAX:
            lines.append(self._waiting.popleft())
        return "\n".join(lines) + "\n"

    def _forget(self) -> None:
        # In a forked process: the waiting lines and the held lock belong to the parent.
        self._waiting.clear()
        self._flushing = threading.RLock()
        self._flusher = None
