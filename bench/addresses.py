"""
Where a process of the benchmark finds its servers and settings, in its environment, and the
programs of the systems.

Every system uses the one database `bench` and one virtual host, created again for each
measurement.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

DATABASE = "bench"

POSTGRES, BROKER, PROBE, VARIANT = "BENCH_POSTGRES", "BENCH_BROKER", "BENCH_PROBE", "BENCH_VARIANT"


def database_url(scheme: str = "postgresql") -> str:
    """
    The DSN of the measurement's database.
    """
    parts = urlsplit(os.environ[POSTGRES])
    return parts._replace(scheme=scheme, path=f"/{DATABASE}").geturl()


def broker_url() -> str:
    """
    The AMQP URL of the measurement's virtual host.
    """
    return os.environ[BROKER]


def variant() -> str:
    """
    Which of its configurations a system is to run in.
    """
    return os.environ.get(VARIANT, "")


def program(name: str) -> str:
    """
    The path of a command that is installed next to this Python.
    """
    return str(Path(sys.executable).with_name(name))
