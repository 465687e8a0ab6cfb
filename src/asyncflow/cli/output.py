"""
Output that may have no reader, or lose it.
"""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

STDERR = 2


def open_streams() -> None:
    """
    Open on /dev/null what is closed of standard input, output and error.

    Else their numbers are given to the next files and connections, and whoever writes to
    standard error writes there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(number, True)
    os.close(number)
    # Python has none where it found the descriptor closed.
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(STDERR, "w", closefd=False)


def outlive_readers() -> None:
    """
    Let nothing fail because the terminal was closed, or the program behind the pipe ended.

    A process that must drain and settle has more to lose than a line of its log, and a
    signal handler that cannot say so would never stop it.
    """
    sys.stdout = _Lasting(sys.stdout)
    sys.stderr = _Lasting(sys.stderr)


class _Lasting:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
