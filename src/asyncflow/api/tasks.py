"""
Reading and steering tasks: get, list, cancel, run now, redrive.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from asyncflow.api.body import read_to_end, refuse_forms
from asyncflow.api.openapi import CHANGE_PROBLEMS, problems
from asyncflow.api.views import page_json, task_json
from asyncflow.domain.states import State
from asyncflow.domain.task import DEFAULT_TENANT_ID
from asyncflow.errors import InvalidQuery, InvalidTask, Refusal
from asyncflow.store import read, steer
from asyncflow.store.database import Executor
from asyncflow.store.read import Page
from asyncflow.store.wakeups import Waker
from asyncflow.wire.tasks import TaskPage, TaskQuery, TaskView

_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

TaskIdText = Annotated[
    str,
    Path(
        alias="id",
        description="The task's id, a UUID with its dashes.",
        json_schema_extra={"format": "uuid"},
    ),
]

_COMMAND_CHECKS = [Depends(read_to_end), Depends(refuse_forms)]
"""Of operations that take no body."""

_COMMAND_PROBLEMS = (
    "task-not-found",
    "request-timeout",
    "illegal-transition",
    "body-too-large",
    "unsupported-media-type",
    "unavailable",
    *CHANGE_PROBLEMS,
)


def add_task_routes(app: FastAPI, db: Executor, waker: Waker, *, through_relay: bool) -> None:
    """
    Serve what can be done with tasks that exist.
    """

    @app.get(
        "/tasks",
        tags=["tasks"],
        summary="List tasks",
        response_model=TaskPage,
        response_description="A page of them.",
        responses=problems("invalid-query", "unavailable"),
    )
    async def list_tasks(request: Request, query: Annotated[TaskQuery, Query()]) -> Response:
        """
        Newest first, without payloads and results. Pass `next_cursor` on as `cursor` to get
        the next page; what is submitted meanwhile moves nothing.
        """
        _check_repetitions(request)
        return _json(page_json(await _page(db, query)))

    @app.get(
        "/tasks/{id}",
        tags=["tasks"],
        summary="Get a task",
        response_model=TaskView,
        response_description="The task as it is now.",
        responses=problems("task-not-found", "unavailable"),
    )
    async def get_task(task_id: TaskIdText) -> Response:
        """
        Everything about one task: its status, payload, result, and every attempt.
        """
        if task_id == "batch":
            raise HTTPException(405)  # A path of its own, for POST.
        task = await read.get(db, DEFAULT_TENANT_ID, _task_id(task_id), through_relay=through_relay)
        return _json(task_json(task))

    @app.post(
        "/tasks/{id}/cancel",
        dependencies=_COMMAND_CHECKS,
        tags=["tasks"],
        summary="Cancel a task",
        response_model=TaskView,
        response_description="It is cancelled.",
        responses={
            202: {"model": TaskView, "description": "It is running; its worker was asked to stop."},
            **problems(*_COMMAND_PROBLEMS),
        },
    )
    async def cancel_task(task_id: TaskIdText) -> Response:
        """
        A waiting task is cancelled at once. A running one may still complete before its
        worker stops it.
        """
        task = await steer.cancel(db, DEFAULT_TENANT_ID, _task_id(task_id))
        return _json(task_json(task), 200 if task.state is State.CANCELLED else 202)

    @app.post(
        "/tasks/{id}/run-now",
        dependencies=_COMMAND_CHECKS,
        tags=["tasks"],
        summary="Run a waiting task now",
        status_code=202,
        response_model=TaskView,
        response_description="It is due.",
        responses=problems(*_COMMAND_PROBLEMS),
    )
    async def run_task_now(task_id: TaskIdText) -> Response:
        """
        A `SCHEDULED` or `RETRYING` task is due now, instead of at its `run_at`, and starts when
        a worker has a slot for it. A task that is due already is left as it is.
        """
        task = await steer.run_now(db, DEFAULT_TENANT_ID, _task_id(task_id))
        waker.wake()
        return _json(task_json(task), 202)

    @app.post(
        "/tasks/{id}/redrive",
        dependencies=_COMMAND_CHECKS,
        tags=["tasks"],
        summary="Redrive a task",
        status_code=202,
        response_model=TaskView,
        response_description="It is pending again.",
        responses=problems(*_COMMAND_PROBLEMS),
    )
    async def redrive_task(task_id: TaskIdText) -> Response:
        """
        Give a failed or cancelled task a new generation: due now, with all its attempts
        before it again. To start a waiting task early, use `run-now`.
        """
        task = await steer.redrive(db, DEFAULT_TENANT_ID, _task_id(task_id))
        waker.wake()
        return _json(task_json(task), 202)


def _check_repetitions(request: Request) -> None:
    # Otherwise the last value would win, and the client would believe that all of them count.
    given = Counter(name for name, _ in request.query_params.multi_items())
    repeated = [name for name, count in given.items() if count > 1 and name != "status"]
    if repeated:
        raise InvalidQuery([(name, "is given more than once") for name in repeated])


async def _page(db: Executor, query: TaskQuery) -> Page:
    try:
        return await read.list_tasks(
            db,
            DEFAULT_TENANT_ID,
            statuses=query.status,
            name=query.name,
            queue=query.queue,
            cursor=query.cursor,
            limit=query.limit,
        )
    except InvalidTask as error:
        faults = [(fault.pointer.removeprefix("/"), fault.detail) for fault in error.errors]
        raise InvalidQuery(faults) from None


def _task_id(text: str) -> UUID:
    if not _UUID.fullmatch(text):
        raise Refusal(
            "task-not-found",
            "A task's id is a UUID with its dashes, such as  0192f0c1-2b3c-7d4e-8f50-123456789abc.",
        )
    return UUID(text)


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")
