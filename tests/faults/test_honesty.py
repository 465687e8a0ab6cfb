"""
The sweep can fail: it covers what it claims to cover, and it detects what is wrong.
"""

from __future__ import annotations

import importlib
from collections import Counter
from uuid import UUID, uuid4

import pytest

from tests.faults.cases import ACTIONS, CASES, GONE, Case
from tests.faults.failpoints import FAILPOINTS, Failpoint
from tests.faults.finding import Facts, Row, judge
from tests.faults.trial import Ground, perform

CASE = Case("postgres", "worker.before-settle", "exit", "completed", 1, 2, 15.0)


def facts(**changes: object) -> Facts:
    """
    The facts of a case in which all is well.
    """
    task_id = uuid4()
    values: dict[str, object] = {
        "fired": True,
        "seconds": 2.0,
        "accepted": [task_id],
        "rows": {task_id: Row("completed", 2, 2)},
        "starts": Counter({task_id: 2}),
        "afterwards": ("completed", "completed"),
        "statuses": {"worker-2": 0},
    }
    return Facts(**{**values, **changes})  # type: ignore[arg-type]


def test_there_are_more_than_a_hundred_cases() -> None:
    """
    The table has more than a hundred cases, each of them once.
    """
    names = [case.name for case in CASES]

    assert len(names) > 100
    assert len(names) == len(set(names))
    assert {case.action for case in CASES} == set(ACTIONS)


def test_every_failpoint_is_used() -> None:
    """
    Every failpoint is used by a case, and every case names an existing failpoint.
    """
    assert {case.point for case in CASES} == set(FAILPOINTS)


@pytest.mark.parametrize("point", FAILPOINTS.values(), ids=list(FAILPOINTS))
def test_what_a_failpoint_wraps_exists(point: Failpoint) -> None:
    """
    The function that a failpoint wraps exists, so a renamed function is not skipped silently.
    """
    module, _, path = point.target.partition(":")
    owner = importlib.import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)

    assert callable(owner)


def test_good_facts_are_judged_good() -> None:
    """
    The facts that the next test corrupts are judged to be fine.
    """
    assert [] == judge(CASE, facts())


OTHER = UUID(int=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fired": False},
        {"trouble": "the worker did not start"},
        {"accepted": [OTHER]},
        {"rows": {OTHER: Row("running", 2, None)}, "starts": Counter({OTHER: 2})},
        {"starts": Counter()},
        {"rows": {OTHER: Row("completed", 2, 1)}, "starts": Counter({OTHER: 2})},
        {"rows": {OTHER: Row("completed", 3, 3)}, "starts": Counter({OTHER: 3})},
        {"seconds": None},
        {"seconds": 15.1},
        {"afterwards": ("pending", "completed")},
        {"left": 1},
        {"hints": 1},
        {"statuses": {"worker-2": 1}},
    ],
    ids=repr,
)
def test_each_wrong_fact_is_detected(wrong: dict[str, object]) -> None:
    """
    A single wrong fact fails the case.
    """
    rows = wrong.get("rows")
    more = {"accepted": list(rows)} if isinstance(rows, dict) else {}

    assert judge(CASE, facts(**more, **wrong))


def test_a_task_that_should_be_gone_and_is_not_is_seen() -> None:
    """
    A task that still exists although it should have been pruned fails the case.
    """
    gone = CASE._replace(state=GONE)

    assert judge(gone, facts())
    assert [] == judge(gone, facts(rows={}, starts=Counter()))


async def test_a_failpoint_that_is_not_reached_did_not_bite(postgres_ground: Ground) -> None:
    """
    A failpoint that is never reached fails its case: without RabbitMQ nothing is acknowledged.
    """
    case = CASE._replace(point="worker.before-ack")
    finding = await perform(case, postgres_ground, bite_seconds=3.0)

    assert "did not bite" in finding.faults[0]


async def test_a_task_that_ends_otherwise_than_it_should_fails_its_case(
    postgres_ground: Ground,
) -> None:
    """
    A real case fails when it is judged by another line of the table.
    """
    case = Case("postgres", "worker.before-settle", "raise", "failed", 1, 1, 3.0)
    finding = await perform(case, postgres_ground)

    assert "completed" in finding.faults[0]
