"""
Whole runs of `asyncflow verify`: of AsyncFlow as it is, and with known bugs in it.

They are short. `bin/test` runs two bugs; ``ASYNCFLOW_TEST_MUTANTS=all`` runs every one, or those
that it names, separated by commas.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncflow.verify.mutants import MUTANTS
from asyncflow.verify.nemesis import FAULTS

QUICK = ("claim-without-lock", "commit-unsynced")
CHOSEN = os.environ.get("ASYNCFLOW_TEST_MUTANTS", ",".join(QUICK))
WANTED = [
    name
    for name, mutant in MUTANTS.items()
    if mutant.engine == "postgres" and (CHOSEN == "all" or name in CHOSEN.split(","))
]


def verify(folder: Path, *arguments: str) -> tuple[int, str]:
    """
    Exit status and output of a run whose histories go to `folder`.
    """
    done = subprocess.run(
        [sys.executable, "-m", "asyncflow", "verify", "--output", str(folder), *arguments],
        cwd=folder.parent,
        env={k: v for k, v in os.environ.items() if not k.startswith("ASYNCFLOW_")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_a_short_run_passes(tmp_path: Path) -> None:
    """
    Killed, cut off and crashed as it is, AsyncFlow keeps its word, and the report says so.
    """
    faults = "kill,pause-briefly,reset-postgres,terminate,terminate-backends,postgres-crash"
    status, output = verify(
        tmp_path / "run", "--minutes", "0.2", "--seed", "1", "--calm", "1", "--faults", faults
    )

    assert 0 == status, output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "passed" == report["verdict"]
    assert report["figures"]["accepted"] > 100
    assert 0 == report["figures"]["lost"]
    assert set(faults.split(",")) == set(report["figures"]["faults"])
    assert (tmp_path / "run" / "report.md").read_text().strip() in output


@pytest.mark.parametrize("name", WANTED)
def test_a_known_bug_is_found(name: str, tmp_path: Path) -> None:
    """
    Within one run, and the report tells the story of a task that met it.
    """
    status, output = verify(tmp_path / "run", "--seed", "1", "--mutant", name)

    assert 1 == status, output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "violated" == report["verdict"], output
    assert report["timelines"]


def test_there_are_a_dozen_known_bugs() -> None:
    """
    And each can be brought out by faults that exist.
    """
    assert len(MUTANTS) >= 12
    assert {kind for mutant in MUTANTS.values() for kind in mutant.faults} <= set(FAULTS)


@pytest.mark.parametrize(
    ("argument", "value"), [("--faults", "earthquake"), ("--mutant", "of-another-kind")]
)
def test_what_does_not_exist_is_refused(argument: str, value: str, tmp_path: Path) -> None:
    """
    With the names that do.
    """
    status, output = verify(tmp_path / "run", argument, value)

    assert 2 == status
    assert next(iter(FAULTS if argument == "--faults" else MUTANTS)) in output
