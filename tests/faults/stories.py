"""
What a case's task goes through until the process fails: a submission, a shutdown, a death.

Most tasks are stored before the process starts, so that the first call that counts concerns them.
Unless the API is the point, they are stored without it, as `builders` does.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from asyncflow.domain.states import State
from asyncflow.domain.task import DEFAULT_TENANT_ID
from asyncflow.store import steer
from tests.support import builders

if TYPE_CHECKING:
    from tests.faults.trial import Trial

AGES = 60.0
"""A time long past every lease and hint, in seconds."""

RETENTION_DAYS = 1.0

Step = Callable[["Trial"], Awaitable[None]]


async def nothing(trial: Trial) -> None:
    """
    Do nothing.
    """


class Story(NamedTuple):
    """
    What happens before the process starts, and once it runs.

    Attributes:
        settings: The settings that the process needs for it.
    """

    prepare: Step
    provoke: Step = nothing
    settings: Mapping[str, object] = MappingProxyType({})


def stored(**payload: object) -> Step:
    """
    Store a waiting task with this payload.
    """

    async def store(trial: Trial) -> None:
        fields = {"name": trial.point.handler, "payload": json.dumps(payload)}
        trial.accepted.extend(await builders.submitted(trial.db, 1, **fields))

    return store


async def submit(trial: Trial) -> None:
    """
    Submit the task over HTTP, and retry until it is answered 202.
    """
    trial.client = asyncio.create_task(trial.submit_until_accepted())


async def send_sigterm(trial: Trial) -> None:
    """
    Ask the worker that runs the task to stop.
    """
    await trial.handler_starts()
    trial.victim.send(signal.SIGTERM)


async def cancel(trial: Trial) -> None:
    """
    Cancel the task while it runs, without the API.
    """
    await trial.handler_starts()
    await steer.cancel(trial.db, DEFAULT_TENANT_ID, trial.accepted[0])


async def cancel_by_http(trial: Trial) -> None:
    """
    Cancel the task through the API while it runs.
    """
    await trial.handler_starts()
    trial.client = asyncio.create_task(trial.post(f"/tasks/{trial.accepted[0]}/cancel"))


async def lose_hint(trial: Trial) -> None:
    """
    Store a task that was queued long ago and whose message is lost.
    """
    task = await builders.a_task(trial.db, state=State.QUEUED, **step(trial))
    await builders.backdate(trial.db, "tasks", task.id, queued_at=AGES)
    trial.accepted.append(task.id)


async def lose_worker(trial: Trial) -> None:
    """
    Store a running task whose worker died silently.
    """
    worker = await builders.a_worker(trial.db)
    task = await builders.a_task(trial.db, state=State.RUNNING, worker_id=worker.id, **step(trial))
    await builders.backdate(trial.db, "workers", worker.id, heartbeat_at=AGES)
    trial.accepted.append(task.id)


async def let_expire(trial: Trial) -> None:
    """
    Store a task that has expired.
    """
    fields = {**step(trial), "expires_at": just_now()}
    trial.accepted.extend(await builders.submitted(trial.db, 1, **fields))


async def finish_long_ago(trial: Trial) -> None:
    """
    Store a completed task whose retention has passed.
    """
    task = await builders.a_task(trial.db, state=State.COMPLETED, **step(trial))
    await builders.backdate(trial.db, "tasks", task.id, finished_at=2 * RETENTION_DAYS * 86_400)
    trial.accepted.append(task.id)


def step(trial: Trial) -> dict[str, Any]:
    """
    The fields of a task that runs the case's handler.
    """
    return {"name": trial.point.handler, "payload": "{}"}


def just_now() -> datetime:
    """
    A time in the recent past.
    """
    return datetime.now(UTC) - timedelta(seconds=1)


STORIES = {
    "submission": Story(nothing, submit),
    "task": Story(stored()),
    "a while": Story(stored(until_fired=True, seconds=1)),
    "failure": Story(stored(failures=1)),
    "shutdown": Story(stored(lingers=True), send_sigterm, {"shutdown_grace_seconds": 0}),
    "stop": Story(stored(lingers=True), cancel),
    "cancellation": Story(stored(lingers=True), cancel_by_http),
    "lost hint": Story(lose_hint),
    "dead worker": Story(lose_worker),
    "expiry": Story(let_expire),
    "old task": Story(finish_long_ago, settings={"retention_days": RETENTION_DAYS}),
}
