"""
A background task is cancelled and awaited by its owner, and its failure is reported.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncflow.aio.background import Background, cancel, start_task

PATIENCE_SECONDS = 5.0


class Duty:
    """
    Work that runs until it is cancelled, and takes a moment to clean up.
    """

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.has_ended = False

    async def run(self) -> None:
        """
        Run until cancelled.
        """
        try:
            self.begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.has_ended = True


@pytest.fixture
async def reported() -> list[dict[str, Any]]:
    """
    The reports to the event loop's exception handler.
    """
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fact: told.append(fact))
    return told


async def test_a_duty_runs_as_long_as_its_owner() -> None:
    """
    A duty runs inside the block, and has ended and cleaned up after it.
    """
    duty = Duty()
    async with Background(duty.run):
        await asyncio.wait_for(duty.begun.wait(), PATIENCE_SECONDS)
        assert not duty.has_ended

    assert duty.has_ended


async def test_a_duty_that_was_never_started_can_be_stopped() -> None:
    """
    Stopping a duty that was never started is allowed, so an owner need not keep track.
    """
    await Background(Duty().run).stop()


async def test_a_failure_is_reported_when_it_happens(reported: list[dict[str, Any]]) -> None:
    """
    A failure is reported when it happens, with the duty's name; the owner continues and may stop
    the ended duty.
    """
    failing = asyncio.Event()

    async def fail() -> None:
        failing.set()
        raise ValueError("a bug")

    background = Background(fail, name="chore")
    background.start()
    await asyncio.wait_for(failing.wait(), PATIENCE_SECONDS)
    await asyncio.sleep(0)

    assert ["chore failed"] == [fact["message"] for fact in reported]
    assert "a bug" == str(reported[0]["exception"])
    await background.stop()
    assert 1 == len(reported)


async def test_a_cancelled_duty_reports_nothing(reported: list[dict[str, Any]]) -> None:
    """
    A cancelled duty is not reported as a failure.
    """
    async with Background(Duty().run):
        await asyncio.sleep(0)

    assert [] == reported


async def test_a_task_tells_its_name_and_its_result() -> None:
    """
    `start_task` is `create_task` with a report of failures.
    """

    async def answer() -> int:
        return 42

    task = start_task(answer(), name="answer")

    assert ("answer", 42) == (task.get_name(), await task)


async def test_cancel_waits_for_every_task(reported: list[dict[str, Any]]) -> None:
    """
    `cancel` waits for every task, even one that fails while it ends; its error is reported, not
    raised.
    """

    async def stumble() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("while ending")

    duty = Duty()
    tasks = [start_task(duty.run(), name="duty"), start_task(stumble(), name="stumble")]
    await asyncio.sleep(0)
    await cancel(*tasks)
    await cancel()

    assert [True, True] == [task.done() for task in tasks]
    assert duty.has_ended
    assert ["stumble failed"] == [fact["message"] for fact in reported]


async def test_a_cancellation_of_the_owner_is_not_swallowed() -> None:
    """
    An owner that is cancelled while it waits for its duty stays cancelled.
    """
    may_end = asyncio.Event()

    async def ends_late() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await may_end.wait()

    task = start_task(ends_late(), name="late")
    await asyncio.sleep(0)
    owner = asyncio.create_task(cancel(task))
    await asyncio.sleep(0)
    owner.cancel()

    with pytest.raises(asyncio.CancelledError):
        await owner
    may_end.set()
    await asyncio.wait([task])
