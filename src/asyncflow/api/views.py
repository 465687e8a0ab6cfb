"""
Rows of the store as the shapes of `wire`.

Payload and result are JSON text in the database and are sent as they are: parsing and writing
them again would cost time and, for a deeply nested result, fail.
"""

from __future__ import annotations

from datetime import datetime
from operator import attrgetter
from typing import Any

from asyncflow.domain.states import State
from asyncflow.domain.task import AttemptRecord, NewTask, Task
from asyncflow.store.read import Page
from asyncflow.store.submit import Submitted
from asyncflow.wire.fields import rfc3339
from asyncflow.wire.tasks import (
    AttemptView,
    TaskError,
    TaskPage,
    TaskProgress,
    TaskSummary,
    TaskView,
    Timings,
)

_RAW = {"payload", "result"}

# Columns that are shown as they are read: what both have.
_SHOWN = tuple(name for name in TaskSummary.model_fields if name in Task.__dataclass_fields__)
_shown_values = attrgetter(*_SHOWN)


def submitted_json(task: NewTask, submitted: Submitted) -> str:
    """
    A `wire.SubmittedTask` as JSON text.

    Written by hand, as every submission needs it: that takes a third of the model's time. Nothing
    in it needs escaping: names and queues have a small alphabet.
    """
    created_at = rfc3339(submitted.created_at)
    run_at = created_at
    if submitted.run_at is not submitted.created_at:
        run_at = rfc3339(submitted.run_at)
    expires_at = f'"{rfc3339(task.expires_at)}"' if task.expires_at else "null"
    return (
        f'{{"id":"{task.id}","name":"{task.name}","status":"{submitted.status}",'
        f'"queue":"{task.queue}","priority":{task.priority},"created_at":"{created_at}",'
        f'"run_at":"{run_at}","expires_at":{expires_at}}}'
    )


def task_json(task: Task) -> str:
    """
    A `wire.TaskView` as JSON text.
    """
    view = TaskView.model_construct(
        **_summary_fields(task),
        error=_error(task.failure),
        waiting_for=task.waiting_for,
        attempts=[_attempt_view(attempt) for attempt in task.attempts],
    )
    head = view.model_dump_json(exclude=_RAW).removesuffix("}")
    return f'{head},"payload":{task.payload or "{}"},"result":{task.result or "null"}}}'


def page_json(page: Page) -> str:
    """
    A `wire.TaskPage` as JSON text.
    """
    tasks = [
        TaskSummary.model_construct(
            **_summary_fields(task), error=_error(task.failure, with_traceback=False)
        )
        for task in page.tasks
    ]
    view = TaskPage.model_construct(tasks=tasks, next_cursor=page.next_cursor)
    return view.model_dump_json()


def _summary_fields(task: Task) -> dict[str, Any]:
    return {
        **dict(zip(_SHOWN, _shown_values(task), strict=True)),
        "progress": TaskProgress.model_construct(**task.progress) if task.progress else None,
        "timings": _timings(task),
    }


def _attempt_view(attempt: AttemptRecord) -> AttemptView:
    return AttemptView.model_construct(
        attempt=attempt.attempt,
        generation=attempt.generation,
        outcome=attempt.outcome.upper(),
        started_at=attempt.started_at,
        finished_at=attempt.finished_at,
        duration_seconds=_seconds(attempt.started_at, attempt.finished_at),
        worker_id=attempt.worker_id,
        error=_error(attempt.failure),
    )


def _timings(task: Task) -> Timings:
    # While a task waits for another attempt, `started_at` is still the earlier one's.
    began = task.started_at if task.state not in (State.PENDING, State.QUEUED) else None
    return Timings.model_construct(
        wait_seconds=_seconds(max(task.run_at, task.created_at), began),
        run_seconds=_seconds(began, task.finished_at),
        total_seconds=_seconds(task.created_at, task.finished_at),
    )


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    if start is None or end is None:
        return None
    return max(0.0, (end - start).total_seconds())


def _error(failure: dict[str, Any] | None, *, with_traceback: bool = True) -> TaskError | None:
    if failure is None:
        return None
    return TaskError.model_construct(
        kind=failure["kind"],
        message=failure["message"],
        traceback=failure.get("traceback") if with_traceback else None,
    )
