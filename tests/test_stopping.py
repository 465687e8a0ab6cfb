"""
Which signals count as requests to stop, and for which process.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
import uvloop

from asyncflow.stopping import ECHO_SECONDS, Signals, signals
from tests.support.tasks import until

NUMBER = signal.SIGUSR1


@pytest.fixture(autouse=True)
def former() -> Iterator[None]:
    """
    Restores the signal handler afterwards.
    """
    handler = signal.getsignal(NUMBER)
    yield
    signal.signal(NUMBER, handler)


async def received(wishes: list[signal.Signals], count: int) -> None:
    """
    Wait until a number of requests to stop have arrived.
    """

    async def are_there() -> bool:
        return len(wishes) >= count

    await until(are_there)


async def test_a_signal_right_after_another_is_the_same_request() -> None:
    """
    A signal shortly after another counts as the same request: a service manager signals a whole
    group, and a parent in it passes the signal on.
    """
    now = 100.0
    wishes: list[signal.Signals] = []
    handled = Signals(wishes.append, numbers=[NUMBER], now=lambda: now)

    handled.handle(signal.SIGTERM)
    now += ECHO_SECONDS / 2
    handled.handle(signal.SIGTERM)
    await received(wishes, 1)
    now += ECHO_SECONDS
    handled.handle(signal.SIGINT)
    await received(wishes, 2)

    assert [signal.SIGTERM, signal.SIGINT] == wishes


def test_a_signal_counts_in_the_process_that_got_it() -> None:
    """
    A child forked without Python shares our handlers and the descriptor that wakes our loop, but a
    signal to it does not count in our process.
    """
    wishes: list[signal.Signals] = []

    async def main() -> None:
        with signals(wishes.append, numbers=[NUMBER]):
            wakes = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(wakes)
            os.write(wakes, bytes([NUMBER]))  # As such a child does on a signal.
            await asyncio.sleep(0.05)
            assert [] == wishes

            os.kill(os.getpid(), NUMBER)
            await received(wishes, 1)

    uvloop.run(main())

    assert [NUMBER] == wishes


async def test_signal_handlers_that_a_task_replaces_are_restored() -> None:
    """
    Signal handlers that a task replaces, in either way, are restored, so the worker can still be
    stopped.
    """
    wishes: list[signal.Signals] = []
    loop = asyncio.get_running_loop()
    with signals(wishes.append, numbers=[NUMBER]) as handled:

        async def are_ours() -> bool:
            return signal.getsignal(NUMBER) == handled.handle

        signal.signal(NUMBER, signal.SIG_IGN)
        await until(are_ours)
        loop.add_signal_handler(NUMBER, int)
        await until(are_ours)
        os.kill(os.getpid(), NUMBER)
        await received(wishes, 1)

    assert [NUMBER] == wishes


async def test_signals_are_given_back_afterwards() -> None:
    """
    The previous signal handlers are restored at the end of the block.
    """
    former = signal.getsignal(NUMBER)

    with signals(lambda number: None, numbers=[NUMBER]):
        assert signal.getsignal(NUMBER) != former

    assert signal.getsignal(NUMBER) == former
