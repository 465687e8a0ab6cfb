"""
Whole runs of `asyncflow verify`: of AsyncFlow as it is, and with planted bugs.

The runs are short. `bin/test` runs two bugs; ``ASYNCFLOW_TEST_MUTANTS=all`` runs every one, and a
comma-separated list selects some.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from asyncflow.verify.faults import FAULTS
from asyncflow.verify.mutants import MUTANTS
from tests.support.broker import Broker

QUICK = ("claim-without-lock", "commit-unsynced")
CHOSEN = os.environ.get("ASYNCFLOW_TEST_MUTANTS", ",".join(QUICK))
WANTED = [name for name in MUTANTS if CHOSEN == "all" or name in CHOSEN.split(",")]
ON_POSTGRES = [name for name in WANTED if MUTANTS[name].engine == "postgres"]
ON_RABBITMQ = [name for name in WANTED if MUTANTS[name].engine == "rabbitmq"]


def verify(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """
    Run `asyncflow verify` with its histories in `folder`; return the exit status and the output.
    """
    done = subprocess.run(
        [sys.executable, "-m", "asyncflow", "verify", "--output", str(folder), *arguments],
        cwd=folder.parent,
        env={k: v for k, v in os.environ.items() if not k.startswith("ASYNCFLOW_")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_a_short_run_passes(tmp_path: Path) -> None:
    """
    Under kills, disconnections and crashes the guarantees hold, and the report says so.
    """
    faults = "kill,pause-briefly,clock-jump,reset-postgres,terminate-backends,postgres-crash"
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


def test_a_short_run_on_a_given_rabbitmq_passes(broker: Broker, tmp_path: Path) -> None:
    """
    The broker is wiped and processes are killed during the run, which leaves nothing behind on the
    broker.
    """
    before = broker.api("GET", "vhosts")
    faults = "kill,broker-erase,reset-broker"
    options = ("--minutes", "0.1", "--seed", "1", "--calm", "1", "--faults", faults)
    status, output = verify(tmp_path / "run", *options, *given(broker))

    assert 0 == status, output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert broker.version == report["plan"]["versions"]["rabbitmq"]
    assert set(faults.split(",")) == set(report["figures"]["faults"])
    assert [v["name"] for v in before] == [v["name"] for v in broker.api("GET", "vhosts")]


def given(broker: Broker) -> list[str]:
    """
    The options for a given broker.
    """
    return ["--broker-url", broker.url, "--management-url", broker.management_url]


@pytest.mark.parametrize("name", ON_POSTGRES)
def test_a_known_bug_is_found(name: str, tmp_path: Path) -> None:
    """
    One run is enough, and the report shows the timeline of an affected task.
    """
    look_for(name, tmp_path)


if ON_RABBITMQ:

    @pytest.mark.parametrize("name", ON_RABBITMQ)
    def test_a_known_bug_with_rabbitmq_is_found(name: str, broker: Broker, tmp_path: Path) -> None:
        """
        One run finds a bug in the code that only RabbitMQ uses.
        """
        look_for(name, tmp_path, *given(broker))


def look_for(name: str, folder: Path, *arguments: str) -> None:
    """
    Run with a planted bug, which must be reported as a violation. A violation that is not about a
    single task, such as a partly stored batch, has no timeline.
    """
    status, output = verify(folder / "run", "--seed", "1", "--mutant", name, *arguments)

    assert 1 == status, output
    report = json.loads((folder / "run" / "report.json").read_text())
    assert "violated" == report["verdict"], output
    assert bool(report["timelines"]) == any(v["task"] for v in report["violations"])


def test_there_are_a_dozen_known_bugs() -> None:
    """
    There are at least a dozen planted bugs, and the faults that expose them exist.
    """
    assert len(MUTANTS) >= 12
    assert {kind for mutant in MUTANTS.values() for kind in mutant.faults} <= set(FAULTS)


@pytest.mark.parametrize(
    ("argument", "value"), [("--faults", "earthquake"), ("--mutant", "of-another-kind")]
)
def test_what_does_not_exist_is_refused(argument: str, value: str, tmp_path: Path) -> None:
    """
    The error lists the valid names.
    """
    status, output = verify(tmp_path / "run", argument, value)

    assert 2 == status
    assert next(iter(FAULTS if argument == "--faults" else MUTANTS)) in output


def test_a_machine_without_rabbitmq_is_told_what_would_help(tmp_path: Path) -> None:
    """
    Without RabbitMQ, the error names both ways to provide one.
    """
    status, output = verify(tmp_path / "run", "--engine", "rabbitmq", PATH=str(tmp_path))

    assert 2 == status
    assert "There is no rabbitmq-server on the PATH." in output
    assert "--broker-url" in output


@pytest.mark.parametrize(
    ("url", "fact"),
    [
        ("amqp://guest:guest@127.0.0.1:1", "No management plugin of RabbitMQ answers at http"),
        ("amqps://127.0.0.1", "must begin with amqp://"),
    ],
)
def test_a_broker_that_cannot_be_used_is_refused(url: str, fact: str, tmp_path: Path) -> None:
    """
    The error says why the broker cannot be used.
    """
    status, output = verify(
        tmp_path / "run", "--broker-url", url, "--management-url", "http://127.0.0.1:1"
    )

    assert 2 == status
    assert fact in output


def test_a_broker_that_refuses_its_user_is_refused(broker: Broker, tmp_path: Path) -> None:
    """
    The error names the user and the response.
    """
    host = broker.url.rpartition("@")[2]
    status, output = verify(
        tmp_path / "run",
        *("--broker-url", f"amqp://nobody:wrong@{host}"),
        *("--management-url", broker.management_url),
    )

    assert 2 == status
    assert "answers 401 to the user 'nobody'" in output
