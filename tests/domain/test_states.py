"""
The table of transitions is complete, has no dead ends, and matches its diagram.
"""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime, timedelta
from itertools import product
from pathlib import Path

import pytest

from asyncflow.domain.states import (
    LIVE,
    TERMINAL,
    TRANSITIONS,
    Event,
    State,
    display_status,
    sources,
)

DOCS = Path(__file__).parents[2] / "docs"

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SOON = NOW + timedelta(microseconds=1)

LEGAL = {
    (State.PENDING, Event.QUEUE, State.QUEUED),
    (State.PENDING, Event.CLAIM, State.RUNNING),
    (State.PENDING, Event.CANCEL, State.CANCELLED),
    (State.PENDING, Event.EXPIRE, State.CANCELLED),
    (State.QUEUED, Event.UNQUEUE, State.PENDING),
    (State.QUEUED, Event.CLAIM, State.RUNNING),
    (State.QUEUED, Event.CANCEL, State.CANCELLED),
    (State.QUEUED, Event.EXPIRE, State.CANCELLED),
    (State.RUNNING, Event.COMPLETE, State.COMPLETED),
    (State.RUNNING, Event.FAIL, State.FAILED),
    (State.RUNNING, Event.RETRY, State.PENDING),
    (State.RUNNING, Event.RELEASE, State.PENDING),
    (State.RUNNING, Event.CANCEL, State.CANCELLED),
    (State.FAILED, Event.REDRIVE, State.PENDING),
    (State.CANCELLED, Event.REDRIVE, State.PENDING),
}
"""The contract, written a second time: a change of the table must change this too."""


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_a_pair_of_state_and_event_is_legal_only_if_the_contract_lists_it(
    state: State, event: Event
) -> None:
    """
    Every pair leads to the state in the contract, or nowhere.
    """
    expected = {to for at, why, to in LEGAL if (at, why) == (state, event)}

    found = TRANSITIONS[state].get(event)

    assert expected == ({found} if found else set())


def test_every_state_is_terminal_or_live_and_never_both() -> None:
    """
    Every state is either terminal or live.
    """
    assert set(State) == TERMINAL | LIVE
    assert not TERMINAL & LIVE


def test_a_terminal_state_is_left_by_a_redrive_only() -> None:
    """
    Only a redrive leaves a terminal state, so a worker's late answer cannot reopen a finished task.
    """
    ways_out = {event for state in TERMINAL for event in TRANSITIONS[state]}

    assert {Event.REDRIVE} == ways_out


@pytest.mark.parametrize("state", State)
def test_a_terminal_state_can_be_reached_from_every_state(state: State) -> None:
    """
    A terminal state is reachable from every state, so no task can get stuck.
    """
    assert _reachable(state) & TERMINAL


def test_every_state_can_be_reached_from_a_submission() -> None:
    """
    Every state is reachable from a submission, so the table has no state that cannot occur.
    """
    assert set(State) == _reachable(State.PENDING)


@pytest.mark.parametrize("event", Event)
def test_sources_lists_exactly_the_states_an_event_may_find(event: Event) -> None:
    """
    The sources are listed in the order of `State`, so that error messages about them are stable.
    """
    expected = tuple(state for state in State if event in TRANSITIONS[state])

    assert expected == sources(event)
    assert expected


@pytest.mark.parametrize(
    ("state", "run_at", "failures", "expected"),
    [
        (State.PENDING, NOW, 0, "PENDING"),
        (State.PENDING, NOW, 3, "PENDING"),
        (State.PENDING, NOW - timedelta(days=1), 0, "PENDING"),
        (State.PENDING, SOON, 0, "SCHEDULED"),
        (State.PENDING, SOON, 1, "RETRYING"),
        (State.QUEUED, SOON, 1, "QUEUED"),
        (State.RUNNING, NOW, 1, "RUNNING"),
        (State.COMPLETED, NOW, 0, "COMPLETED"),
        (State.FAILED, SOON, 5, "FAILED"),
        (State.CANCELLED, SOON, 0, "CANCELLED"),
    ],
)
def test_people_see_scheduled_and_retrying_only_before_run_at(
    state: State, run_at: datetime, failures: int, expected: str
) -> None:
    """
    SCHEDULED and RETRYING are shown for pending tasks that are not due; nothing else is renamed.
    """
    assert expected == display_status(state, run_at=run_at, failures=failures, now=NOW)


def test_the_chart_in_the_docs_is_drawn_from_the_table() -> None:
    """
    The chart matches the table; run `python docs/make_states.py` after changing it.
    """
    spec = importlib.util.spec_from_file_location("make_states", DOCS / "make_states.py")
    assert spec and spec.loader
    make_states = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_states)

    assert make_states.page() == (DOCS / "states.md").read_text()


def _reachable(start: State) -> set[State]:
    found: set[State] = set()
    new = [start]
    while new:
        state = new.pop()
        found.add(state)
        new += [to for to in TRANSITIONS[state].values() if to not in found]
    return found
