"""
Standard streams that may be closed when a command starts.
"""

from __future__ import annotations

import os
import sys

STDERR = 2


def open_streams() -> None:
    """
    Open those of standard input, output and error that are closed, on /dev/null.

    Otherwise the next files and connections would get their numbers, and writes to standard
    error would end up in them.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(number, True)
    os.close(number)
    # Python sets a stream to None if it found the descriptor closed.
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(STDERR, "w", closefd=False)
