"""
A process imports only what it runs.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.programs import environment

SERVERS = {"fastapi", "starlette", "uvicorn"}
MIGRATIONS = {"alembic", "sqlalchemy"}
TERMINALS = {"rich", "structlog"}
TYPES = {"psutil", "pydantic"}

HEAVY = {
    "worker": SERVERS | MIGRATIONS | TERMINALS | TYPES,
    "maintenance": SERVERS | MIGRATIONS | TERMINALS | TYPES,
    "api": MIGRATIONS | TERMINALS,
}


@pytest.mark.parametrize("command", HEAVY)
def test_a_process_starts_without_what_others_need(
    command: str, database_url: str, tmp_path: Path
) -> None:
    """
    A process does not import what only other processes need: memory and start-up time are paid per
    process, and there are many workers.
    """
    env = environment(database_url=database_url, api_port=free_port())
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "asyncflow", command],
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    imported = set()
    for line in process.stderr:
        imported.add(line.rpartition("|")[2].strip().partition(".")[0])
        if "process.started" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate()

    assert set() == imported & HEAVY[command]
