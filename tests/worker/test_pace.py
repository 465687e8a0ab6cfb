"""
How far ahead a worker claims: many short tasks at a time, slow ones only into free slots.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as some

from asyncflow.worker.pace import HORIZON_SECONDS, WINDOW_MAX, Pace


def a_pace(slots: int, *run_seconds: float) -> Pace:
    """
    A pace that has seen these attempts.
    """
    pace = Pace(slots)
    for seconds in run_seconds:
        pace.observe(seconds)
    return pace


def test_an_unknown_workload_is_claimed_one_by_one() -> None:
    """
    A worker claims ahead only once it knows that tasks are short.
    """
    pace = Pace(8)

    assert (1, 8) == (pace.batch, pace.window)


def test_slow_tasks_are_claimed_one_by_one_into_free_slots() -> None:
    """
    Slow tasks are claimed only into free slots, so workers share them evenly.
    """
    pace = a_pace(8, 10.0)

    assert (1, 8) == (pace.batch, pace.window)


def test_short_tasks_are_claimed_as_far_ahead_as_the_horizon() -> None:
    """
    As many short tasks are claimed as the slots start within the horizon.
    """
    pace = a_pace(10, 0.005)

    expected = round(10 * HORIZON_SECONDS / 0.005)
    assert (expected, expected) == (pace.batch, pace.window)


@pytest.mark.parametrize("seconds", [0.0, 1e-9])
def test_tasks_that_take_no_time_are_bounded_too(seconds: float) -> None:
    """
    However short the tasks, no more are claimed than can be settled soon.
    """
    pace = a_pace(10, seconds)

    assert (WINDOW_MAX, WINDOW_MAX) == (pace.batch, pace.window)


def test_a_change_of_the_workload_is_noticed() -> None:
    """
    When short tasks turn slow, the worker returns to its slots.
    """
    pace = a_pace(4, *[0.001] * 100)
    assert pace.window > 100

    for _ in range(20):
        pace.observe(5.0)

    assert (1, 4) == (pace.batch, pace.window)


def test_a_pace_can_be_forgotten() -> None:
    """
    A pace that was reset starts again from the slots.
    """
    pace = a_pace(4, *[0.001] * 100)

    pace.forget()

    assert (1, 4) == (pace.batch, pace.window)


@given(
    slots=some.integers(1, 500),
    run_seconds=some.lists(some.floats(0, 1e6), max_size=50),
)
def test_the_window_never_leaves_its_bounds(slots: int, run_seconds: list[float]) -> None:
    """
    The window is at least the slots and at most the larger of slots and `WINDOW_MAX`; a batch fits
    the window.
    """
    pace = a_pace(slots, *run_seconds)

    assert 1 <= pace.batch <= WINDOW_MAX
    assert max(slots, pace.batch) == pace.window
