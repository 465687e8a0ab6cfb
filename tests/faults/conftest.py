"""
One sweep per engine, over the cases whose tests were selected.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.cases import CASES, Case
from tests.faults.sweep import Sweep
from tests.faults.trial import Ground
from tests.support.broker import Broker
from tests.support.postgres import PostgresServer

REPOSITORY = Path(__file__).parents[2]

# A log line per request would bury the output of the processes.
logging.getLogger("httpx").setLevel(logging.WARNING)


@pytest.fixture(scope="module")
def ground_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """
    The working directory of all processes, from which they can import the tests' modules.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        yield tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def postgres_ground(postgres_server: PostgresServer, ground_folder: Path) -> Ground:
    """
    PostgreSQL alone.
    """
    # The first database creates the template, which must not happen concurrently.
    postgres_server.drop_database(postgres_server.create_database())
    return Ground(postgres_server, None, ground_folder)


@pytest.fixture(scope="module")
def rabbitmq_ground(postgres_ground: Ground, broker: Broker) -> Ground:
    """
    PostgreSQL and RabbitMQ.
    """
    return Ground(postgres_ground.postgres, broker, postgres_ground.folder)


@pytest.fixture(scope="module")
def postgres_sweep(postgres_ground: Ground, request: pytest.FixtureRequest) -> Iterator[Sweep]:
    """
    The cases of PostgreSQL alone.
    """
    with sweeping(postgres_ground, "postgres", request) as sweep:
        yield sweep


@pytest.fixture(scope="module")
def rabbitmq_sweep(rabbitmq_ground: Ground, request: pytest.FixtureRequest) -> Iterator[Sweep]:
    """
    The cases of PostgreSQL with RabbitMQ.
    """
    with sweeping(rabbitmq_ground, "rabbitmq", request) as sweep:
        yield sweep


@contextmanager
def sweeping(ground: Ground, engine: str, request: pytest.FixtureRequest) -> Iterator[Sweep]:
    """
    A running sweep; when it ends, its report is printed and written to a file.
    """
    sweep = Sweep(ground, [case for case in chosen_cases(request) if case.engine == engine])
    try:
        yield sweep
    finally:
        sweep.stop()
        report = sweep.report()
        (ground.folder / f"{engine}.txt").write_text(report)
        sys.stdout.write(f"\n{report}")


def chosen_cases(request: pytest.FixtureRequest) -> list[Case]:
    """
    The cases whose tests were selected, in the order of the table.
    """
    functions = [item for item in request.session.items if isinstance(item, pytest.Function)]
    params = [function.callspec.params for function in functions if hasattr(function, "callspec")]
    chosen = {values["case"] for values in params if isinstance(values.get("case"), Case)}
    return [case for case in CASES if case in chosen]
