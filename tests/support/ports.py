"""
Ports for servers that tests start, stop and start again, each time on the same one.

They lie below the range that the system gives to clients: one of those could take the port of a
server that is just restarting. And each belongs to one test until its process ends, whether a
server listens there or not: several tests run at the same time, and so may several runs.
`asyncflow verify` takes its ports from 20,000 on.
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
    Take a port on which nobody listens.
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
    # One byte for each port, locked by the process that has it; the system forgets what a dead
    # process had. Never closed: that would give back all.
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
