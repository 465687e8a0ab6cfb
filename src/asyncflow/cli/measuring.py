"""
The measurement behind `asyncflow bench`: submits tasks to a running deployment and reads their
times from the database. `bench` prints the results.

Tasks are submitted in natural batches, as the HTTP API does, but from this process: the figures
cover the database, the broker and the workers, without HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from uuid import UUID

from asyncflow.aio.batching import Batcher
from asyncflow.domain.policy import PRIORITY_DEFAULT
from asyncflow.domain.task import DEFAULT_TENANT_ID, NewTask, TaskIds
from asyncflow.errors import CannotMeasure
from asyncflow.store import measurements, submit
from asyncflow.store.database import Database
from asyncflow.store.measurements import Capacity, Course
from asyncflow.store.wakeups import Waker

HANDLER = "sample-task"
CALLERS = 32
BATCH_SIZE_MAX = 500
BATCH_BYTES_MAX = 4 * 1024 * 1024
TRICKLE_TASKS = 200
TRICKLE_SECONDS = 0.02
STALL_SECONDS_MAX = 30.0
POLL_SECONDS = 0.1
CHUNK = 1_000
"""Tasks per statement that reads or deletes."""


@dataclass(frozen=True, slots=True)
class Rate:
    """
    The throughput of a number of tasks.

    Attributes:
        completed: How many of the tasks completed.
        submitted_per_second: Until the last was acknowledged.
        completed_per_second: Until the last was finished, by the database's clock. Workers
            start while later tasks are still being submitted.
    """

    tasks: int
    completed: int
    submitted_per_second: float
    completed_per_second: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """
    The results of one run.

    Attributes:
        latency: Of single tasks on an idle system.
        one_by_one: From `CALLERS` concurrent callers that wait for each answer.
        in_batches: From one caller that submits one batch after another.
    """

    latency: Course
    one_by_one: Rate
    in_batches: Rate


class Bench:
    """
    One measurement of a deployment.

    Args:
        queue: The queue of its tasks; live workers must serve it.
        payload_bytes: The size of each payload; a smaller one than the handler needs is enlarged.
        stall_seconds: The measurement fails if no task finishes for this long.
    """

    def __init__(
        self,
        db: Database,
        *,
        queue: str,
        payload_bytes: int,
        stall_seconds: float = STALL_SECONDS_MAX,
    ) -> None:
        self._db = db
        self._stall_seconds = stall_seconds
        self._queue = queue
        self._payload = payload_of(payload_bytes)
        self._ids = TaskIds()
        self._waker = Waker(db)
        self._submitted: list[UUID] = []
        self._batcher: Batcher[NewTask, None] = Batcher(
            self._submit,
            size_max=BATCH_SIZE_MAX,
            weigh=lambda task: len(task.payload),
            weight_max=BATCH_BYTES_MAX,
        )

    async def capacity(self) -> Capacity:
        """
        The workers that will run the tasks.

        Raises:
            CannotMeasure: There are none, or the queue is paused.
        """
        capacity = await measurements.capacity(self._db, HANDLER, self._queue)
        if capacity.is_paused:
            raise CannotMeasure(
                f"Queue {self._queue!r} is paused; resume it or choose another with --queue."
            )
        if not capacity.workers:
            raise CannotMeasure(
                f"No live worker offers {HANDLER!r} on queue {self._queue!r}. Every `asyncflow "
                "worker` has this handler: start one, or choose a queue that is served with "
                "--queue."
            )
        return capacity

    async def measure(self, count: int) -> Measurement:
        """
        Measure the latency of single tasks, then the throughput of `count` tasks twice.

        Raises:
            CannotMeasure: Tasks make no progress.
        """
        await self._trickle(1)  # Opens the connections.
        return Measurement(
            latency=await self._trickle(TRICKLE_TASKS),
            one_by_one=await self._one_by_one(count),
            in_batches=await self._in_batches(count),
        )

    async def close(self) -> None:
        """
        Wait for submissions in flight.
        """
        await self._batcher.drain()
        await self._waker.close()

    async def remove(self) -> int:
        """
        Delete the submitted tasks except those that are running; return how many.
        """
        removed = 0
        for chunk in _chunks(self._submitted, CHUNK):
            removed += await measurements.remove(self._db, chunk)
        self._submitted = []
        return removed

    async def _trickle(self, count: int) -> Course:
        begun = len(self._submitted)
        start = time.perf_counter()
        for step in range(count):
            await asyncio.sleep(start + step * TRICKLE_SECONDS - time.perf_counter())
            await self._submit(self._new_tasks(1))
        return await self._course(self._submitted[begun:])

    async def _one_by_one(self, count: int) -> Rate:
        begun = len(self._submitted)
        turns = repeat(None, count)

        async def caller() -> None:
            for _ in turns:
                await self._batcher.submit(*self._new_tasks(1))

        start = time.perf_counter()
        async with asyncio.TaskGroup() as callers:
            for _ in range(CALLERS):
                callers.create_task(caller())
        return await self._rate(self._submitted[begun:], time.perf_counter() - start)

    async def _in_batches(self, count: int) -> Rate:
        begun = len(self._submitted)
        size_max = max(1, min(BATCH_SIZE_MAX, BATCH_BYTES_MAX // len(self._payload)))
        start = time.perf_counter()
        for first in range(0, count, size_max):
            await self._submit(self._new_tasks(min(size_max, count - first)))
        return await self._rate(self._submitted[begun:], time.perf_counter() - start)

    def _new_tasks(self, count: int) -> list[NewTask]:
        return [
            NewTask(
                id=self._ids.next(),
                tenant_id=DEFAULT_TENANT_ID,
                name=HANDLER,
                queue=self._queue,
                priority=PRIORITY_DEFAULT,
                payload=self._payload,
            )
            for _ in range(count)
        ]

    async def _submit(self, new: Sequence[NewTask]) -> list[None]:
        # Before the submission, whose answer may be lost: what may be stored must be removed.
        self._submitted += [task.id for task in new]
        await submit.submit(self._db, new)
        self._waker.wake()
        return [None] * len(new)

    async def _rate(self, task_ids: Sequence[UUID], submit_seconds: float) -> Rate:
        course = await self._course(task_ids)
        return Rate(
            tasks=len(task_ids),
            completed=course.completed,
            submitted_per_second=len(task_ids) / submit_seconds,
            completed_per_second=len(task_ids) / course.seconds,
        )

    async def _course(self, task_ids: Sequence[UUID]) -> Course:
        await self._until_finished(task_ids)
        return await measurements.course(self._db, task_ids)

    async def _until_finished(self, task_ids: Sequence[UUID]) -> None:
        deadline = time.monotonic() + self._stall_seconds
        # In chunks, and only what is left of each: polling must not slow the measurement.
        for chunk in _chunks(task_ids, CHUNK):
            left: Sequence[UUID] = chunk
            while unfinished := await measurements.unfinished(self._db, left):
                if len(unfinished) < len(left):
                    deadline = time.monotonic() + self._stall_seconds
                elif time.monotonic() > deadline:
                    raise CannotMeasure(
                        f"{len(unfinished)} tasks made no progress for {self._stall_seconds:g} "
                        "seconds. Are all workers busy with other tasks? With RabbitMQ, is "
                        "`asyncflow maintenance` running, and do both use the same broker?"
                    )
                left = unfinished
                await asyncio.sleep(POLL_SECONDS)


def payload_of(payload_bytes: int) -> str:
    """
    A payload of this size, or the smallest the handler accepts; it makes the handler do nothing.
    """
    least = '{"seconds":0}'
    if payload_bytes <= len(least):
        return least
    frame = '{"seconds":0,"filler":""}'
    # Random, because PostgreSQL compresses values.
    filler = base64.b64encode(os.urandom(payload_bytes)).decode()
    return f'{frame[:-2]}{filler[: max(0, payload_bytes - len(frame))]}"}}'


def _chunks(task_ids: Sequence[UUID], size: int) -> Iterator[Sequence[UUID]]:
    return (task_ids[first : first + size] for first in range(0, len(task_ids), size))
