"""
A worker whose machine lacks a resource takes fewer tasks, and works normally again once it
recovers.
"""

from __future__ import annotations

import time

import pytest

from asyncflow.worker.isolation.shortage import PAUSE_SECONDS_MAX, Shortage


class Clock:
    """
    A monotonic clock that a test advances.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def length(shortage: Shortage, clock: Clock) -> int:
    """
    Seconds that a pause beginning now takes.
    """
    shortage.meet("no more processes")
    seconds = 0
    while shortage.lasts:
        clock.now += 1.0
        seconds += 1
    return seconds


def test_pauses_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Pauses double up to a bound, so a lasting shortage is not retried every second.
    """
    clock, shortage = Clock(monkeypatch), Shortage()

    assert not shortage.lasts
    lengths = [length(shortage, clock) for _ in range(7)]
    assert [1, 2, 4, 8, 16, PAUSE_SECONDS_MAX, PAUSE_SECONDS_MAX] == lengths


def test_an_attempt_that_can_begin_shortens_the_next_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A successful start shortens the next pause, since it proves that the resource is available
    again.
    """
    clock, shortage = Clock(monkeypatch), Shortage()
    before = [length(shortage, clock) for _ in range(3)]
    shortage.pass_by()

    assert ([1, 2, 4], 1) == (before, length(shortage, clock))


def test_attempts_that_fail_together_make_one_pause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    Attempts that fail together cause one pause and one log line.
    """
    clock, shortage = Clock(monkeypatch), Shortage()
    for _ in range(3):
        shortage.meet("no more processes")

    assert 1 == length(shortage, clock)
    assert 1 == capsys.readouterr().out.count("worker.starved")
