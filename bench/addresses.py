"""
How a process of the benchmark finds its servers and settings, from its environment, and the
systems' programs.

Every system uses the same database `bench` and the same virtual host, recreated for each
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
    The configuration that a system must run in.
    """
    return os.environ.get(VARIANT, "")


def program(name: str) -> str:
    """
    The path of a command installed next to this Python.
    """
    return str(Path(sys.executable).with_name(name))
