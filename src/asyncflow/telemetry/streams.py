"""
Standard output and error that neither fail nor block, whatever happens to their reader.

If a terminal is closed, the program behind a pipe has ended or been stopped, a disk is full or a
handler closes `sys.stderr`, an ordinary stream raises, or blocks and the event loop with it. Here
what cannot be written is dropped and counted. A slow reader gets a second, because a full pipe is
normal; one that uses it up gets none until it reads again.

Complete lines are written immediately, so a killed process loses none.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import sys
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, TextIO, cast

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

ROOM_SECONDS = 1.0

WRITE_BYTES_MAX = 4096
"""Larger writes to a pipe that several processes share may be split (PIPE_BUF), and may block
although there is room."""


class Outlet(io.RawIOBase):
    """
    Writes to a file descriptor, in bounded time and without errors.

    Closing it does nothing, because all code in this process shares it.

    Args:
        report: The text about a number of dropped writes, written once there is room again.
        room_seconds: How long a write waits for room before it is dropped.
    """

    def __init__(
        self,
        descriptor: int,
        report: Callable[[int], str] | None = None,
        *,
        room_seconds: float = ROOM_SECONDS,
    ) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._report = report
        self._room_seconds = room_seconds
        self._lost = 0
        self._has_reader = True
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self._write_bytes_max = sys.maxsize if is_file else WRITE_BYTES_MAX
        self._may_hang = os.get_blocking(descriptor) and not is_file

    def write(self, data: ReadableBuffer, /) -> int:
        """
        Write all of `data`, or drop the rest.
        """
        whole = memoryview(data).cast("B")
        if self._lost and self._waits_for_room():
            lost, self._lost = self._lost, 0
            if self._report is not None:
                self._put(memoryview(self._report(lost).encode()))
        self._put(whole)
        return len(whole)

    def writable(self) -> bool:
        """
        Always true.
        """
        return True

    def fileno(self) -> int:
        """
        The descriptor, for example for child processes that should write to it.
        """
        return self._descriptor

    def isatty(self) -> bool:
        """
        Whether it is a terminal.
        """
        return os.isatty(self._descriptor)

    def close(self) -> None:
        """
        Do nothing: other code writes here, too.
        """

    def _put(self, rest: memoryview) -> None:
        with contextlib.suppress(OSError):  # no reader, no disk, no such descriptor
            while rest and (not self._may_hang or self._waits_for_room()):
                try:
                    rest = rest[os.write(self._descriptor, rest[: self._write_bytes_max]) :]
                except BlockingIOError:
                    if not self._waits_for_room():
                        break
        self._lost += bool(rest)

    def _waits_for_room(self) -> bool:
        room = select.poll()  # one for each call: threads must not share it
        room.register(self._descriptor, select.POLLOUT)
        self._has_reader = bool(room.poll(1000 * self._room_seconds if self._has_reader else 0))
        return self._has_reader


def guard_standard_streams() -> None:
    """
    Make writes to `sys.stdout` and `sys.stderr`, such as `print()`, neither fail nor block, and
    make closing them a no-op.
    """
    sys.stdout = _guarded(sys.stdout)
    sys.stderr = _guarded(sys.stderr)


def own_stream(stream: TextIO, report: Callable[[int], str]) -> TextIO:
    """
    A private stream to the same file as `stream`, because handlers may close or replace the public
    one. `stream` itself if it has no file descriptor.

    Args:
        report: See `Outlet`.
    """
    descriptor = _descriptor_of(stream)
    if descriptor is None:
        return stream
    outlet = Outlet(_own_descriptor(descriptor), report)
    return _text(outlet, encoding="utf-8", errors="backslashreplace")


def _guarded(stream: TextIO) -> TextIO:
    descriptor = _descriptor_of(stream)
    if descriptor is None:
        return stream
    return _text(Outlet(descriptor), encoding=stream.encoding, errors=stream.errors)


def _text(outlet: Outlet, *, encoding: str, errors: str | None) -> TextIO:
    buffer = cast("IO[bytes]", outlet)  # It has everything a text stream needs.
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=True)


def _descriptor_of(stream: TextIO | None) -> int | None:
    try:
        descriptor = None if stream is None else stream.fileno()
        if descriptor is not None:
            os.fstat(descriptor)  # It may be closed.
    except (OSError, ValueError):
        return None
    return descriptor


def _own_descriptor(descriptor: int) -> int:
    # A reopened pipe is non-blocking for us alone; the flag of a shared descriptor is shared.
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
    return os.dup(descriptor)
