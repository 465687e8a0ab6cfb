"""
Ports for servers that tests start, stop and start again, each time on the same one.

They are below the range of ephemeral ports, so no client can take the port of a server that is
restarting. Each one belongs to one test process until that ends, whether a server listens there or
not, because several tests and several test runs may run concurrently. `asyncflow verify` uses ports
from 20,000 on.
"""

from __future__ import annotations

import fcntl
import functools
import os
import random
import socket
import tempfile
from pathlib import Path
from typing import IO

LOWEST, HIGHEST = 10_000, 19_999


def free_port() -> int:
    """
    Reserve a port on which no process listens.
    """
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """
    Reserve `count` ports.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(LOWEST, HIGHEST)
        if port not in _taken and _is_ours(port) and _is_free(port):
            _taken.add(port)
            ports.append(port)
    return ports


_taken: set[int] = set()


@functools.cache
def _book() -> IO[bytes]:
    # One byte for each port, locked by the process that owns it; the system releases the locks of a
    # dead process. Never closed: that would release all locks.
    path = Path(tempfile.gettempdir()) / f"asyncflow-test-ports-{os.getuid()}"
    return path.open("ab")


def _is_ours(port: int) -> bool:
    try:
        fcntl.lockf(_book(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
