"""
Output that may lose its reader.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO


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
