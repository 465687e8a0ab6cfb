"""
Schemathesis reads the description of a live API and sends valid data, invalid data, and sequences
of requests that follow from earlier answers. No answer is a server error, every answer is
described, and every 202 is a row.

The suite contains a run of a few seconds with a fixed seed. For a longer one:

    ASYNCFLOW_TEST_FUZZ_CASES=20000 ASYNCFLOW_TEST_FUZZ_SEED=2 bin/test tests/api/test_fuzz.py
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from tests.support.live import live_api

CASES = int(os.environ.get("ASYNCFLOW_TEST_FUZZ_CASES", "500"))
SEED = int(os.environ.get("ASYNCFLOW_TEST_FUZZ_SEED", "1"))
HERE = Path(__file__).parent


@pytest.mark.timeout(120 + CASES / 5)
def test_the_api_does_what_its_description_says(database_url: str, tmp_path: Path) -> None:
    """
    All phases and checks of Schemathesis pass, with valid and invalid data and NUL bytes.
    """
    file = tmp_path / "answers"
    with live_api(database_url, tmp_path) as api:
        output = fuzz(f"{api.url}/openapi.json", file)
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    rows = asyncio.run(stored(database_url))

    statuses = Counter(answer["status"] for answer in answers)
    assert len(answers) >= CASES, output
    assert not [status for status in statuses if status >= 500], statuses
    accepted = [UUID(task_id) for answer in answers for task_id in answer["ids"]]
    assert accepted
    assert sorted(accepted) == sorted(rows)
    assert {200, 202, 404, 405, 409, 422} <= set(statuses)  # Otherwise it covered too little.


def fuzz(url: str, answers: Path) -> str:
    """
    Run Schemathesis to its end, without a failure, and return its output.
    """
    run = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli"),
            *("--config-file", str(HERE / "schemathesis.toml"), "--no-color"),
            *("run", url, "--seed", str(SEED), "--max-examples", str(examples())),
        ],
        cwd=answers.parent,
        env={
            **os.environ,
            "PYTHONPATH": str(HERE),
            "ASYNCFLOW_TEST_FUZZ_ANSWERS": str(answers),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert 0 == run.returncode, run.stdout
    return run.stdout


def examples() -> int:
    """
    How many examples per operation make roughly `CASES` cases.
    """
    return CASES // 10


async def stored(database_url: str) -> Sequence[UUID]:
    """
    The id of every task.
    """
    connection = await asyncpg.connect(database_url)
    try:
        return [row["id"] for row in await connection.fetch("SELECT id FROM asyncflow.tasks")]
    finally:
        await connection.close()
