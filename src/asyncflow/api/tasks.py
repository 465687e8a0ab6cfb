"""
Reading and steering tasks: get, list, cancel, redrive.
"""

from __future__ import annotations

import re
from typing import Annotated
from uuid import UUID

from fastapi import Depends, FastAPI, HTTPException, Path, Query
from starlette.responses import Response

from asyncflow.api.body import read_to_end
from asyncflow.api.openapi import problems
from asyncflow.api.problems import InvalidQuery, Refusal
from asyncflow.api.views import page_json, task_json
from asyncflow.domain.states import State
from asyncflow.domain.task import DEFAULT_TENANT_ID
from asyncflow.errors import InvalidTask
from asyncflow.store import tasks as store
from asyncflow.store.database import Executor
from asyncflow.store.wakeups import Waker
from asyncflow.wire import TaskPage, TaskQuery, TaskView

_CHANGE_PROBLEMS = (
    "task-not-found",
    "request-timeout",
    "illegal-transition",
    "body-too-large",
    "unavailable",
)
_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")

TaskIdText = Annotated[
    str,
    Path(
        alias="id",
        description="The task's id, in lower case with dashes.",
        json_schema_extra={"format": "uuid"},
    ),
]


def add_task_routes(app: FastAPI, db: Executor, waker: Waker) -> None:
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
    async def list_tasks(query: Annotated[TaskQuery, Query()]) -> Response:
        """
        Newest first, without payloads and results. Pass `next_cursor` on as `cursor` to get
        the next page; what is submitted meanwhile moves nothing.
        """
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
        return _json(task_json(await store.get(db, DEFAULT_TENANT_ID, _task_id(task_id))))

    @app.post(
        "/tasks/{id}/cancel",
        dependencies=[Depends(read_to_end)],
        tags=["tasks"],
        summary="Cancel a task",
        response_model=TaskView,
        response_description="It is cancelled.",
        responses={
            202: {"model": TaskView, "description": "It is running; its worker was asked to stop."},
            **problems(*_CHANGE_PROBLEMS),
        },
    )
    async def cancel_task(task_id: TaskIdText) -> Response:
        """
        A waiting task is cancelled at once. A running one may still complete before its
        worker stops it.
        """
        task = await store.cancel(db, DEFAULT_TENANT_ID, _task_id(task_id))
        return _json(task_json(task), 200 if task.state is State.CANCELLED else 202)

    @app.post(
        "/tasks/{id}/redrive",
        dependencies=[Depends(read_to_end)],
        tags=["tasks"],
        summary="Redrive a task",
        status_code=202,
        response_model=TaskView,
        response_description="It is pending again.",
        responses=problems(*_CHANGE_PROBLEMS),
    )
    async def redrive_task(task_id: TaskIdText) -> Response:
        """
        Give a failed or cancelled task a new generation: due now, with all its attempts
        before it again.
        """
        task = await store.redrive(db, DEFAULT_TENANT_ID, _task_id(task_id))
        waker.wake()
        return _json(task_json(task), 202)


async def _page(db: Executor, query: TaskQuery) -> store.Page:
    try:
        return await store.list_tasks(
            db,
            DEFAULT_TENANT_ID,
            status=query.status,
            name=query.name,
            queue=query.queue,
            cursor=query.cursor,
            limit=query.limit,
        )
    except InvalidTask as error:
        faults = [(fault.pointer.removeprefix("/"), fault.detail) for fault in error.faults]
        raise InvalidQuery(faults) from None


def _task_id(text: str) -> UUID:
    if not _CANONICAL_UUID.fullmatch(text):
        raise Refusal(
            "task-not-found",
            "A task's id is a UUID in lower case with dashes, "
            "such as 0192f0c1-2b3c-7d4e-8f50-123456789abc.",
        )
    return UUID(text)


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")
