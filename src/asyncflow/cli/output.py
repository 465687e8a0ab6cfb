"""
Standard streams that may be closed when a command starts.
"""

from __future__ import annotations

import os
import sys

STDERR = 2


def open_streams() -> None:
    """
    Open on /dev/null what is closed of standard input, output and error.

    Otherwise the next files and connections get their numbers, and writes to standard error end
    up there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(number, True)
    os.close(number)
    # Python has none where it found the descriptor closed.
    sys.stdin = sys.stdin or open(0, closefd=False)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(STDERR, "w", closefd=False)
