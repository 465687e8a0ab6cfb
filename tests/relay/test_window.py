"""
The window of a queue: how many hints RabbitMQ should hold, in packs of what size, and when to send
more.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

from asyncflow.relay.window import (
    HALVED_SECONDS,
    REST_SECONDS_MAX,
    REST_SECONDS_MIN,
    SIZE_MAX,
    SIZE_MIN,
    Window,
)
from asyncflow.transport.rabbitmq.message import PACK_MAX

FULL = SIZE_MAX
REST = REST_SECONDS_MIN


class Round(NamedTuple):
    """
    A round over a queue of 10 slots, long after the last one, and the window it should find.

    Attributes:
        ready: Number of hints that RabbitMQ holds.
        waiting: Number of tasks that wait to be sent.
    """

    ready: int
    waiting: int
    room: int
    pack: int
    rest: float


def next_round(window: Window, *, ready: int, slots: int = 10, waiting: int = FULL) -> Window:
    """
    A round after a long enough pause, which sends everything there is room for.
    """
    window = window.observed(ready=ready, slots=slots, now=after_a_rest(window))
    return window.filled(sent=min(waiting, window.room))


def after_a_rest(window: Window) -> float:
    """
    A time by which the window has rested for long enough.
    """
    return max(0.0, window.observed_at) + 100


def after(*ready: int, slots: int = 10) -> Window:
    """
    A window after rounds that found this many hints and filled it.
    """
    window = Window()
    for count in ready:
        window = next_round(window, ready=count, slots=slots)
    return window


@pytest.mark.parametrize(
    "history",
    [
        pytest.param(
            [
                Round(0, FULL, room=20, pack=1, rest=REST),
                Round(0, FULL, room=40, pack=2, rest=REST),
                Round(0, FULL, room=80, pack=4, rest=REST),
                Round(0, FULL, room=160, pack=8, rest=REST),
            ],
            id="drained between two rounds: it doubles",
        ),
        pytest.param(
            [
                Round(0, FULL, room=20, pack=1, rest=REST),
                Round(2, FULL, room=38, pack=2, rest=REST),
                Round(6, FULL, room=34, pack=2, rest=REST),
            ],
            id="an eighth is left: drained; more is left: not drained",
        ),
        pytest.param(
            [
                Round(0, 19, room=20, pack=1, rest=REST),
                Round(0, FULL, room=20, pack=1, rest=REST),
            ],
            id="drained, but the tasks ran out: it does not double",
        ),
        pytest.param(
            [
                Round(0, FULL, room=20, pack=1, rest=REST),
                Round(20, FULL, room=0, pack=1, rest=2 * REST),
                Round(20, FULL, room=0, pack=1, rest=4 * REST),
                Round(13, FULL, room=7, pack=1, rest=4 * REST),
                Round(9, FULL, room=11, pack=1, rest=2 * REST),
            ],
            id="rests longer while less than a quarter is used, shorter once more than half is",
        ),
        pytest.param(
            [
                Round(0, FULL, room=20, pack=1, rest=REST),
                Round(20, FULL, room=0, pack=1, rest=2 * REST),
                Round(0, FULL, room=20, pack=1, rest=REST),
                Round(0, FULL, room=40, pack=2, rest=REST),
            ],
            id="drained after a long rest: first it rests less, then it doubles",
        ),
        pytest.param(
            [
                Round(0, FULL, room=20, pack=1, rest=REST),
                Round(0, FULL, room=40, pack=2, rest=REST),
                Round(21, FULL, room=17, pack=1, rest=REST),
            ],
            id="more than half is left: it shrinks",
        ),
        pytest.param(
            [
                Round(0, FULL, room=20, pack=1, rest=REST),
                Round(0, FULL, room=40, pack=2, rest=REST),
                Round(0, FULL, room=80, pack=4, rest=REST),
                Round(41, FULL, room=0, pack=3, rest=REST),
                Round(30, FULL, room=45, pack=3, rest=REST),
            ],
            id="packs wait until half a window fits",
        ),
    ],
)
def test_what_a_round_finds_moves_the_window(history: list[Round]) -> None:
    """
    Each round determines how many hints to send, in packs of what size, and when the next round is
    due.
    """
    window = Window()
    found = []
    for step in history:
        window = next_round(window, ready=step.ready, waiting=step.waiting)
        found.append(step._replace(room=window.room, pack=window.pack, rest=window.rest_seconds))

    assert history == found


def test_a_round_changes_no_earlier_window() -> None:
    """
    A window is a value: the same round gives the same window again.
    """
    window = after(0, 0)

    once, twice = next_round(window, ready=3), next_round(window, ready=3)

    assert once == twice != window
    assert after(0, 0) == window


def test_the_window_grows_up_to_a_bound() -> None:
    """
    The window is never larger than `SIZE_MAX`, however fast workers drain it.
    """
    assert SIZE_MAX == after(*[0] * 20).room


def test_the_window_shrinks_while_workers_are_slow() -> None:
    """
    A window that is mostly full between rounds shrinks to what the slots need.
    """
    window = after(*[0] * 10, *[SIZE_MAX] * 200)

    assert 0 == next_round(window, ready=20).room
    assert 1 == next_round(window, ready=19).room


@pytest.mark.parametrize("wakes_seconds", [None, 0.004])
@pytest.mark.parametrize("used_per_second", [2, 20, 100, 200, 500])
def test_a_window_is_observed_again_when_a_part_of_it_is_used_up(
    used_per_second: int, wakes_seconds: float | None
) -> None:
    """
    The slower the tasks, the later the next round. Slow tasks do not make the window grow, and no
    slot waits for the next round, even if submissions wake the relay in between and then cease.
    """
    window = Window()
    ready, now, starved, rests = 0.0, 0.0, 0.0, []
    for number in range(400):
        window = window.observed(ready=math.ceil(ready), slots=10, now=now)
        ready += window.room
        window = window.filled(sent=window.room)
        is_woken = wakes_seconds is not None and number % 100 < 50
        rest = wakes_seconds if wakes_seconds and is_woken else window.rest_seconds
        starved += max(0.0, rest * used_per_second - ready)
        ready = max(0.0, ready - rest * used_per_second)
        now += rest
        rests.append(window.rest_seconds)

    assert 1 == window.pack
    assert starved < 0.02 * now * used_per_second
    # Never later than the 20 hints of a window last.
    assert max(rests[50:]) <= max(REST_SECONDS_MIN, min(REST_SECONDS_MAX, 20 / used_per_second))
    if used_per_second == 2:
        assert REST_SECONDS_MAX == max(rests)


def test_a_window_that_was_observed_too_late_does_not_grow() -> None:
    """
    A window observed too late does not grow: it may have been large enough, so it is first observed
    as often as possible.
    """
    window = after(*[20] * 10)
    assert REST_SECONDS_MAX == window.rest_seconds

    late = next_round(window, ready=0)

    assert (20, REST_SECONDS_MIN) == (late.room, late.rest_seconds)
    assert 40 == next_round(late, ready=0).room


def test_the_window_follows_the_workers_slots() -> None:
    """
    More workers get more hints; a window is never smaller than `SIZE_MIN`.
    """
    assert SIZE_MIN == after(0, slots=1).room
    assert 200 == after(0, slots=100).room


@pytest.mark.parametrize("slots", [1, 10, 1_000])
def test_slow_tasks_travel_one_by_one(slots: int) -> None:
    """
    A window that workers do not drain between two rounds has no packs, whatever the slots.
    """
    window, full = Window(), max(SIZE_MIN, 2 * slots)
    for ready in (0, full // 2, full, full):
        window = next_round(window, ready=ready, slots=slots)

        assert 1 == window.pack


def test_packs_grow_and_shrink_with_the_window() -> None:
    """
    Packs are always small enough for a window to have a message for every slot.
    """
    window = Window()
    packs = []
    for _ in range(10):
        window = next_round(window, ready=0)
        packs.append(window.pack)
    assert [1, 2, 4, 8, 16, 32, PACK_MAX] == packs[:7]
    assert PACK_MAX == packs[-1]

    for _ in range(200):
        window = next_round(window, ready=SIZE_MAX)

    assert 1 == window.pack


def test_a_halved_window_stays_small_for_a_while() -> None:
    """
    Every hint that RabbitMQ drops halves the window further, down to 1; then it recovers.
    """
    window = after(0)
    rooms = []
    for _ in range(6):
        window = window.halved(now=window.observed_at)
        window = window.observed(ready=0, slots=10, now=window.observed_at)
        rooms.append(window.room)
    assert [10, 5, 2, 1, 1, 1] == rooms

    recovered = window.observed(ready=0, slots=10, now=window.observed_at + HALVED_SECONDS)

    assert 20 == recovered.room
