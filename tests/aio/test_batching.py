"""
Natural batching: no item waits for others, none is lost, and one bad item fails alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from asyncflow.aio.batching import Batcher
from asyncflow.errors import StoreUnavailable

PATIENCE_SECONDS = 5.0


class Flushes:
    """
    A backend that doubles numbers, and answers a batch when the test allows it.
    """

    def __init__(self, *, is_open: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.under_way = 0
        self.most_under_way = 0
        self._gate = asyncio.Event()
        if is_open:
            self._gate.set()

    def open(self) -> None:
        """
        Answer everything from now on.
        """
        self._gate.set()

    async def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self._gate.wait()
        finally:
            self.under_way -= 1
        if -1 in items:
            raise ValueError("minus one")
        if -2 in items:
            raise StoreUnavailable("down")
        return [2 * item for item in items]


async def turns(count: int = 5) -> None:
    """
    Let everything that is ready run.
    """
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_lone_item_is_sent_immediately() -> None:
    """
    A lone item is sent immediately, without waiting for a timer.
    """
    flushes = Flushes(is_open=True)

    async with asyncio.timeout(PATIENCE_SECONDS):
        answer = await Batcher(flushes).submit(4)

    assert (8, [[4]]) == (answer, flushes.batches)


async def test_what_arrives_during_a_flush_forms_the_next_batch() -> None:
    """
    Items that arrive during a flush form the next batch, in order, and each caller gets its own
    answer.
    """
    flushes = Flushes()
    batcher = Batcher(flushes, in_flight_max=1)
    futures = [batcher.submit(0)]
    await turns()
    futures += [batcher.submit(n) for n in range(1, 6)]

    flushes.open()

    assert [0, 2, 4, 6, 8, 10] == await asyncio.gather(*futures)
    assert [[0], [1, 2, 3, 4, 5]] == flushes.batches


async def test_batches_are_bounded_in_size_and_in_number() -> None:
    """
    A batch has at most ten items, and at most three batches are in flight.
    """
    flushes = Flushes()
    batcher = Batcher(flushes, size_max=10, in_flight_max=3)
    futures = []
    for n in range(95):
        futures.append(batcher.submit(n))
        await turns(1)

    flushes.open()

    assert [2 * n for n in range(95)] == await asyncio.gather(*futures)
    assert 3 == flushes.most_under_way
    assert 10 == max(len(batch) for batch in flushes.batches)


@pytest.mark.parametrize("in_flight_max", [1, 2])
async def test_an_item_submitted_on_an_answer_is_never_forgotten(in_flight_max: int) -> None:
    """
    An item submitted by a caller that wakes up while its batch is still ending is not forgotten.
    """

    async def double(items: Sequence[int]) -> list[int]:
        return [2 * item for item in items]

    batcher = Batcher(double, in_flight_max=in_flight_max)

    async def one_after_another() -> list[int]:
        return [await batcher.submit(n) for n in range(100)]

    async with asyncio.timeout(PATIENCE_SECONDS):
        answers = await asyncio.gather(*(one_after_another() for _ in range(5)))

    assert [[2 * n for n in range(100)]] * 5 == answers


async def test_one_bad_item_fails_alone() -> None:
    """
    A failed batch is repeated item by item, so one bad item fails alone.
    """
    flushes = Flushes(is_open=True)
    batcher = Batcher(flushes, in_flight_max=1)
    futures = [batcher.submit(n) for n in (1, -1, 3)]

    answers = await asyncio.gather(*futures, return_exceptions=True)

    assert [2, "minus one", 6] == [a if isinstance(a, int) else str(a) for a in answers]
    assert [[1, -1, 3], [1], [-1], [3]] == flushes.batches


async def test_an_error_of_the_far_side_reaches_every_caller_once() -> None:
    """
    An error of the backend reaches every caller once, since trying each item alone would only
    burden a database that is down.
    """
    flushes = Flushes(is_open=True)
    batcher = Batcher(flushes, in_flight_max=1)
    futures = [batcher.submit(n) for n in (1, -2, 3)]

    answers = await asyncio.gather(*futures, return_exceptions=True)

    assert [StoreUnavailable] * 3 == [type(answer) for answer in answers]
    assert 1 == len(flushes.batches)


async def test_a_batcher_goes_on_after_an_error() -> None:
    """
    An error does not affect the next item.
    """
    batcher = Batcher(Flushes(is_open=True))
    for broken in (-1, -2):
        with pytest.raises((ValueError, StoreUnavailable)):
            await batcher.submit(broken)

        assert 14 == await batcher.submit(7)


async def test_a_cancelled_caller_disturbs_no_other() -> None:
    """
    A cancelled caller's item stays in the batch, because the backend may already have it.
    """
    flushes = Flushes()
    batcher = Batcher(flushes, in_flight_max=1)
    futures = [batcher.submit(n) for n in (1, 2, 3)]
    await turns()
    futures[1].cancel()

    flushes.open()

    assert [2, 6] == [await futures[0], await futures[2]]
    assert [[1, 2, 3]] == flushes.batches


async def test_drain_waits_for_everything_that_was_submitted() -> None:
    """
    `drain` waits for all submitted items, even those not yet in flight, and returns immediately if
    there are none.
    """
    flushes = Flushes()
    batcher = Batcher(flushes, size_max=1, in_flight_max=1)
    await batcher.drain()
    futures = [batcher.submit(n) for n in range(5)]
    draining = asyncio.create_task(batcher.drain())
    await turns()
    was_done = draining.done()

    flushes.open()
    await draining

    assert not was_done
    assert all(future.done() for future in futures)


async def test_a_flush_that_loses_an_answer_leaves_nobody_waiting() -> None:
    """
    A flush that returns too few answers is a bug, and every caller of its batch gets an error.
    """

    async def forgetful(items: Sequence[int]) -> list[int]:
        return list(items[1:])

    batcher = Batcher(forgetful, in_flight_max=1)
    futures = [batcher.submit(n) for n in range(3)]

    async with asyncio.timeout(PATIENCE_SECONDS):
        answers = await asyncio.gather(*futures, return_exceptions=True)

    assert ["2 answers for 3 items"] * 3 == [str(answer) for answer in answers]


async def test_a_batch_ends_before_it_weighs_too_much() -> None:
    """
    A batch is bounded by weight: large items do not share a statement, and one over the limit goes
    alone.
    """
    batches: list[list[int]] = []

    async def flush(items: Sequence[int]) -> list[int]:
        batches.append(list(items))
        return list(items)

    batcher = Batcher(flush, weigh=lambda n: n, weight_max=10, in_flight_max=1)
    await asyncio.gather(*[batcher.submit(n) for n in (4, 6, 1, 99, 2, 3)])

    assert [[4, 6], [1], [99], [2, 3]] == batches
