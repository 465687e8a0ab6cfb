"""
A worker whose machine lacks something takes fewer tasks, and all of them again once it does not.
"""

from __future__ import annotations

import time

import pytest

from asyncflow.worker.isolation.shortage import PAUSE_SECONDS_MAX, Shortage


class Clock:
    """
    A monotonic clock that a test turns.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def length(shortage: Shortage, clock: Clock) -> int:
    """
    How many seconds the pause takes that begins now.
    """
    shortage.meet("no more processes")
    seconds = 0
    while shortage.lasts:
        clock.now += 1.0
        seconds += 1
    return seconds


def test_pauses_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A machine that lacks something for long is not tried every second.
    """
    clock, shortage = Clock(monkeypatch), Shortage()

    assert not shortage.lasts
    lengths = [length(shortage, clock) for _ in range(7)]
    assert [1, 2, 4, 8, 16, PAUSE_SECONDS_MAX, PAUSE_SECONDS_MAX] == lengths


def test_an_attempt_that_can_begin_shortens_the_next_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    It proves that there is room again.
    """
    clock, shortage = Clock(monkeypatch), Shortage()
    before = [length(shortage, clock) for _ in range(3)]
    shortage.pass_by()

    assert ([1, 2, 4], 1) == (before, length(shortage, clock))


def test_attempts_that_fail_together_make_one_pause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    And one line in the log.
    """
    clock, shortage = Clock(monkeypatch), Shortage()
    for _ in range(3):
        shortage.meet("no more processes")

    assert 1 == length(shortage, clock)
    assert 1 == capsys.readouterr().out.count("worker.starved")
