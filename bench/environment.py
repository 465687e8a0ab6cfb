"""
Describes the machine and versions of a run, for its first raw line.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import psutil

from bench.run import Run

PACKAGES = (
    *("asyncflow", "asyncpg", "uvloop", "uvicorn", "fastapi", "pydantic"),
    *("sqlalchemy", "aio-pika", "celery", "dramatiq", "taskiq", "taskiq-aio-pika"),
    *("taskiq-asyncpg", "procrastinate", "psycopg", "pgqueuer", "awa-pg"),
)


def describe(run: Run, arguments: Sequence[str]) -> Mapping[str, Any]:
    """
    Everything a reader needs to judge the figures.
    """
    return {
        "scenario": "environment",
        "at": round(time.time()),
        # The folder in which a run was assembled does not belong in the report.
        "arguments": re.sub(r"--into[ =]\S+", "", " ".join(arguments)).split(),
        "sizes": asdict(run.sizes),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "servers": run.services.versions,
        "packages": {package: version(package) for package in PACKAGES},
        "generator": "wrk" if shutil.which("wrk") else "a small Python client",
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
