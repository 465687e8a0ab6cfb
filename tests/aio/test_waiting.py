"""
Waiting for an event with a time limit, and the delays between tries.
"""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.aio.waiting import Delays, set_within

PATIENCE_SECONDS = 5.0


async def test_a_wait_ends_when_the_event_is_set() -> None:
    """
    A wait returns True as soon as the event is set.
    """
    event = asyncio.Event()
    waiting = asyncio.create_task(set_within(event, 3_600.0))
    event.set()

    assert await asyncio.wait_for(waiting, PATIENCE_SECONDS)


async def test_a_wait_ends_without_the_event() -> None:
    """
    A wait returns False when its time is over, and raises nothing.
    """
    assert not await set_within(asyncio.Event(), 0.0)


async def test_a_set_event_is_seen_without_time() -> None:
    """
    A wait of 0 seconds returns whether the event is set now.
    """
    event = asyncio.Event()
    event.set()

    assert await set_within(event, 0.0)


async def test_a_wait_can_be_cancelled() -> None:
    """
    A cancellation, or a caller's time limit, is not mistaken for the wait's own limit.
    """
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.0):
            await set_within(asyncio.Event(), 3_600.0)


def test_delays_double_up_to_the_longest() -> None:
    """
    Delays double up to the longest, so a peer that stays away is asked less and less often.
    """
    delays = Delays(1.0, longest=5.0, jitter=0.0)

    assert [1.0, 2.0, 4.0, 5.0, 5.0] == [delays.next() for _ in range(5)]


def test_delays_start_again_once_a_try_worked() -> None:
    """
    Once a try has worked, the next outage begins with the first delay.
    """
    delays = Delays(1.0, longest=60.0, jitter=0.0)
    delays.next(), delays.next()
    delays.reset()

    assert [1.0, 2.0] == [delays.next(), delays.next()]


def test_delays_without_a_longest_are_constant() -> None:
    """
    Without a longest delay, the delay is constant.
    """
    delays = Delays(0.5, jitter=0.0)

    assert [0.5, 0.5, 0.5] == [delays.next() for _ in range(3)]


@pytest.mark.parametrize(("drawn", "seconds"), [(0.0, 10.0), (0.5, 6.0), (1.0, 2.0)])
def test_jitter_shortens_a_delay_by_its_share(drawn: float, seconds: float) -> None:
    """
    A jitter of 0.8 leaves between a fifth of the delay and all of it.
    """
    delays = Delays(10.0, jitter=0.8, random=lambda: drawn)

    assert delays.next() == pytest.approx(seconds)


def test_jitter_does_not_add_up() -> None:
    """
    Jitter does not accumulate: the next delay doubles the full one, not the shortened one.
    """
    delays = Delays(1.0, longest=60.0, jitter=1.0, random=lambda: 0.75)

    assert [0.25, 0.5, 1.0] == [delays.next() for _ in range(3)]
