"""
The protocol's rules hold in everything that can happen, and the exploration finds known mistakes.
"""

from __future__ import annotations

import pytest

from tests.model import invariants, mistakes
from tests.model.explore import EVERYTHING_ENDS, MOVES_ARE_LEGAL, Violation, explore
from tests.model.protocol import OnlyMessagesGetLost, Protocol, WithoutBroker

ONE_WORKER_OFFERS_ALL = (frozenset({0, 1}), frozenset({0}))

SCOPES = {
    "one task, two faults": (Protocol(tasks=1, faults=2, requests=0), 95_000),
    "one task, a fault and a request": (Protocol(tasks=1, faults=1, requests=1), 140_000),
    "one task, two requests": (Protocol(tasks=1, faults=0, requests=2), 3_000),
    "two tasks, one of them declined, two lost messages": (
        OnlyMessagesGetLost(
            tasks=2, faults=2, requests=0, max_attempts=1, offers=ONE_WORKER_OFFERS_ALL
        ),
        40_000,
    ),
    "no broker, one task, two faults and a request": (
        WithoutBroker(tasks=1, faults=2, requests=1),
        75_000,
    ),
    "no broker, two tasks, a fault": (WithoutBroker(tasks=2, faults=1, requests=0), 25_000),
}
"""What is explored, and the minimum number of worlds: with fewer, something is left out."""

RULES = dict(invariants.IN_EVERY_WORLD) | dict(invariants.AT_EVERY_CHANGE)


def rule(check: object) -> str:
    """
    An invariant's sentence.
    """
    return next(text for text, holds in RULES.items() if holds is check)


MISTAKES: dict[type[Protocol], str] = {
    mistakes.SettlesUnderAnyLease: rule(invariants.leases_fence),
    mistakes.SettlesInAnyState: MOVES_ARE_LEGAL,
    mistakes.ReapsById: rule(invariants.moves_are_arrows),
    mistakes.ReapsWhatRuns: rule(invariants.leases_fence),
    mistakes.NeverReaps: EVERYTHING_ENDS,
    mistakes.ClaimsWhatRuns: MOVES_ARE_LEGAL,
    mistakes.ClaimsWhatIsNotDue: rule(invariants.nothing_starts_early_or_late),
    mistakes.ClaimsWhilePaused: rule(invariants.nothing_starts_early_or_late),
    mistakes.ForgetsFailures: rule(invariants.failures_are_kept),
    mistakes.FailsOnlyAfterMaxAttempts: rule(invariants.failures_are_bounded),
    mistakes.AnswersLiveLeasesWithARequeue: EVERYTHING_ENDS,
    mistakes.NeverFindsLostHints: EVERYTHING_ENDS,
    mistakes.MarksBeforeItPublishes: EVERYTHING_ENDS,
    mistakes.BeatsWhileItHangs: EVERYTHING_ENDS,
    mistakes.KnowsNoOrphans: EVERYTHING_ENDS,
    mistakes.ReleasesWhatIsOnItsWay: rule(invariants.what_runs_has_the_lease),
    mistakes.RetriesWhatIsCancelled: rule(invariants.a_cancelled_task_does_not_wait),
    mistakes.CancelsWhatRuns: rule(invariants.leases_fence),
    mistakes.RedrivesWhatCompleted: MOVES_ARE_LEGAL,
}
"""The rule that each mistake breaks first, in the fewest steps."""


@pytest.mark.parametrize("scope", SCOPES)
def test_no_rule_is_broken_in_anything_that_can_happen(scope: str) -> None:
    """
    Every task ends once faults stop, wherever they have led.
    """
    protocol, states_min = SCOPES[scope]

    explored = explore(protocol)

    assert states_min <= explored.states


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake: type[Protocol]) -> None:
    """
    The exploration finds the mistake, with a path to it and the rule that it breaks.
    """
    with pytest.raises(Violation) as found:
        for faults, requests in ((0, 0), (1, 0), (0, 1)):
            explore(mistake(tasks=1, faults=faults, requests=requests))

    assert MISTAKES[mistake] == found.value.rule
    assert found.value.path


def test_every_mistake_is_one_that_must_be_found() -> None:
    """
    Every mistake that is written is also tested.
    """
    written = {
        value
        for value in vars(mistakes).values()
        if isinstance(value, type) and value.__module__ == mistakes.__name__
    }

    assert set(MISTAKES) == written - {mistakes.OnlyTheRelayCrashes}


def test_a_relay_that_publishes_before_it_marks_loses_nothing_when_it_crashes() -> None:
    """
    Publishing before marking loses nothing even if the relay never searched for lost hints; the
    other order would lose a hint for good.
    """
    explore(mistakes.OnlyTheRelayCrashes(tasks=1, faults=2, requests=0, max_attempts=1))

    with pytest.raises(Violation):
        explore(mistakes.MarksBeforeItPublishes(tasks=1, faults=1, requests=0, max_attempts=1))


def test_a_way_to_a_violation_is_told_in_steps() -> None:
    """
    The path to a violation lists the steps in order, and each worker keeps its number.
    """
    with pytest.raises(Violation) as found:
        explore(mistakes.ReapsById(tasks=1, faults=1, requests=0))

    lines = str(found.value).splitlines()
    assert "Broken: every change of state is in the table." == lines[0]
    assert "the reaper settles task 0: retry" in lines[-1]
    assert not any("worker 2" in line for line in lines)
