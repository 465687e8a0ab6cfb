"""
Natural batching: while one call is under way, what arrives meanwhile forms the next batch.

There is no timer. A lone item goes out immediately, as a batch of one; under load the batches
grow by themselves to whatever arrives during one round trip. Submits, settles, publishes
and acks all travel this way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from asyncflow.errors import StoreUnavailable, TransportError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batcher(Generic[Item, Answer]):
    """
    Turns many concurrent `submit` calls into few calls of `flush`.

    Args:
        flush: Takes a batch and returns one answer per item, in order. An exception
            it raises reaches its callers, see `shared_errors`.
        size_max: Most items in one batch, 1 or more.
        weigh, weight_max: A batch ends before its items weigh more than this together; an
            item that weighs more alone goes alone.
        in_flight_max: Most batches in flight, 1 or more. More than one keeps
            a slow round trip from holding up the next.
        shared_errors: What `flush` raises when the whole batch is at fault or none of
            it; it reaches every caller. Any other error makes the batch go again item by
            item, so that one bad item fails alone; `flush` must be all or nothing then.
    """

    def __init__(
        self,
        flush: Callable[[Sequence[Item]], Awaitable[Sequence[Answer]]],
        *,
        size_max: int = 500,
        weigh: Callable[[Item], int] = lambda _: 0,
        weight_max: int = 0,
        in_flight_max: int = 2,
        shared_errors: tuple[type[Exception], ...] = (StoreUnavailable, TransportError),
    ) -> None:
        self._flush = flush
        self._shared_errors = shared_errors
        self._size_max = size_max
        self._weigh = weigh
        self._weight_max = weight_max
        self._in_flight_max = in_flight_max
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._flushing: set[asyncio.Task[None]] = set()

    def submit(self, item: Item) -> asyncio.Future[Answer]:
        """
        Put `item` into the next batch; the future resolves to its answer.

        Giving up on the future does not take the item out of its batch.
        """
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if len(self._flushing) < self._in_flight_max:
            self._start()
        return future

    async def drain(self) -> None:
        """
        Wait until everything submitted so far has been answered.
        """
        while self._flushing:
            await asyncio.wait(self._flushing)

    def _start(self) -> None:
        task = asyncio.get_running_loop().create_task(self._run())
        self._flushing.add(task)
        # Covers a task that is cancelled before it runs at all.
        task.add_done_callback(self._flushing.discard)

    async def _run(self) -> None:
        try:
            while self._waiting:
                size = self._size_of_next()
                batch, self._waiting = self._waiting[:size], self._waiting[size:]
                await self._answer(batch)
        finally:
            # Not later: a caller that we answered last may submit before this task counts
            # as done, and would wait for a task that looks no more.
            task = asyncio.current_task()
            assert task is not None
            self._flushing.discard(task)

    def _size_of_next(self) -> int:
        weight = 0
        for size, (item, _) in enumerate(self._waiting[: self._size_max]):
            weight += self._weigh(item)
            if weight > self._weight_max:
                return max(1, size)
        return self._size_max

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        try:
            answers = await self._flush([item for item, _ in batch])
        except self._shared_errors as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for entry in batch:
                await self._answer([entry])
        except BaseException:
            for _, future in batch:
                future.cancel()
            raise
        else:
            _resolve(batch, answers)


def _resolve(batch: list[tuple[Item, asyncio.Future[Answer]]], answers: Sequence[Answer]) -> None:
    if len(answers) != len(batch):
        return _fail(batch, ValueError(f"{len(answers)} answers for {len(batch)} items"))
    for (_, future), answer in zip(batch, answers, strict=True):
        if not future.done():
            future.set_result(answer)


def _fail(batch: list[tuple[Item, asyncio.Future[Answer]]], error: Exception) -> None:
    for _, future in batch:
        if not future.done():
            future.set_exception(error)
