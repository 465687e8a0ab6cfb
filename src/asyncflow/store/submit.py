"""
Submitting tasks: one statement for any number of them, all or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from asyncflow.domain.states import State, display_status
from asyncflow.domain.task import NewTask
from asyncflow.store.columns import SUBMITTED, Parameter
from asyncflow.store.database import Executor


class Submitted(NamedTuple):
    """
    What the database decided about a new task.
    """

    status: str
    created_at: datetime
    run_at: datetime


# What is stored in a column, where it is not the parameter of its name.
_STORED = {
    "run_at": "coalesce(run_at, now() + delay_microseconds * interval '1 microsecond', now())",
    "payload": "payload::json",
}
_DELAY = Parameter("delay_microseconds", "bigint", has_default=True)
_PARAMETERS = [_DELAY if p.name == "delay_seconds" else p for p in SUBMITTED]
_COLUMNS = [p.name for p in _PARAMETERS if p is not _DELAY]

SUBMIT = f"""
    WITH stored AS (
        INSERT INTO asyncflow.tasks
               ({", ".join(_COLUMNS)})
        SELECT {", ".join(_STORED.get(column, column) for column in _COLUMNS)}
          FROM unnest({", ".join(f"${n}::{p.type}[]" for n, p in enumerate(_PARAMETERS, 1))})
               AS new ({", ".join(p.name for p in _PARAMETERS)}))
    SELECT now()
"""


async def submit(db: Executor, tasks: Sequence[NewTask]) -> list[Submitted]:
    """
    Store new tasks, all or none. Once this returns they survive any crash.

    Returns:
        In the order given.

    Raises:
        StoreUnavailable: None of them is stored, unless the connection was lost while PostgreSQL
            committed; then all of them may be.
    """
    if not tasks:
        return []
    # One row comes back, not one per task: all are created at the same moment, and with it
    # the rest of the answer is known.
    created_at = await db.fetchval(SUBMIT, *_arguments(tasks))
    due_now = _submitted(created_at, run_at=created_at)
    return [
        _submitted(created_at, run_at=_run_at(task, created_at))
        if task.run_at or task.delay_seconds
        else due_now
        for task in tasks
    ]


async def submit_nothing(db: Executor) -> None:
    """
    Prove that PostgreSQL would take a submission: it checks every right that a submission needs.

    Raises:
        StoreUnavailable: It would not.
    """
    await db.fetchval(SUBMIT, *[()] * len(_PARAMETERS))


def _arguments(tasks: Sequence[NewTask]) -> list[Sequence[Any]]:
    arrays: dict[str, Sequence[Any]] = dict(
        zip(NewTask._fields, zip(*tasks, strict=True), strict=True)
    )
    arrays["delay_seconds"] = [_microseconds(seconds) for seconds in arrays["delay_seconds"]]
    return [
        _unless_all_none(array) if parameter.has_default else array
        for parameter, array in zip(_PARAMETERS, arrays.values(), strict=True)
    ]


def _unless_all_none(array: Sequence[Any]) -> Sequence[Any]:
    # `unnest` fills up the shorter of its arrays with NULL.
    return array if array.count(None) < len(array) else ()


def _microseconds(delay_seconds: float) -> int | None:
    # Whole ones, so that adding them here and in the database gives the same moment.
    return round(delay_seconds * 1_000_000) if delay_seconds else None


def _run_at(task: NewTask, created_at: datetime) -> datetime:
    delay = timedelta(microseconds=_microseconds(task.delay_seconds) or 0)
    return task.run_at or created_at + delay


def _submitted(created_at: datetime, *, run_at: datetime) -> Submitted:
    status = display_status(State.PENDING, run_at=run_at, failures=0, now=created_at)
    return Submitted(status, created_at, run_at)
