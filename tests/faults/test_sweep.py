"""
The sweep: a process fails at each step of a task's path, and nothing is lost.

`failpoints` lists the steps, `cases.txt` what must hold after each. A case whose failpoint is never
reached fails.
"""

from __future__ import annotations

import pytest

from tests.faults.cases import CASES, Case
from tests.faults.finding import Finding
from tests.faults.sweep import Sweep

# A test waits for the case it is named after, and for those before it.
pytestmark = pytest.mark.timeout(600)


def cases_of(engine: str) -> list[object]:
    """
    The cases of one engine, as parameters of a test.
    """
    return [pytest.param(case, id=case.name) for case in CASES if case.engine == engine]


@pytest.mark.parametrize("case", cases_of("postgres"))
def test_nothing_is_lost_on_postgres(case: Case, postgres_sweep: Sweep) -> None:
    """
    The task ends, its handler starts no more often than allowed, and nothing is stuck.
    """
    assert_held(postgres_sweep.finding(case))


@pytest.mark.parametrize("case", cases_of("rabbitmq"))
def test_nothing_is_lost_with_rabbitmq(case: Case, rabbitmq_sweep: Sweep) -> None:
    """
    The same holds with RabbitMQ, and no message is left behind.
    """
    assert_held(rabbitmq_sweep.finding(case))


def assert_held(finding: Finding) -> None:
    """
    Fail with what is wrong and the output of the processes.
    """
    assert not finding.faults, f"{finding.line()}\n{finding.tails}"
