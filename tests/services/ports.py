"""
Ports for servers that tests stop and start again, each time on the same one.

They lie below the range that the system gives to clients: one of those could take the port of a
server that is just restarting. For the same reason each process that runs tests has its own.
`asyncflow verify` takes its ports from 20,000 on.
"""

from __future__ import annotations

import os
import random
import socket

LOWEST, HIGHEST = 10_000, 19_999
PROCESSES_MAX = 10
NUMBER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % PROCESSES_MAX


def free_port() -> int:
    """
    Find a port on which nobody listens.
    """
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """
    Find so many of them.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(LOWEST + NUMBER, HIGHEST + 1, PROCESSES_MAX)
        if port not in ports and _is_free(port):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
