"""
Reading and steering tasks: list, get, cancel, run now, redrive.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, HTTPException, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from asyncflow.api.body import read_to_end, refuse_forms
from asyncflow.api.dependencies import Db, TenantId, TheParts
from asyncflow.api.openapi import CHANGE_PROBLEMS, operation_id, problems
from asyncflow.api.views import page_json, task_json
from asyncflow.domain.states import State
from asyncflow.errors import InvalidQuery, InvalidTask, Refusal
from asyncflow.store import read, steer
from asyncflow.store.database import Executor
from asyncflow.store.read import Page
from asyncflow.wire.tasks import TaskPage, TaskQuery, TaskView

_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

TaskIdText = Annotated[
    str,
    Path(
        alias="id",
        description="The task's id, a UUID with dashes.",
        json_schema_extra={"format": "uuid"},
    ),
]

_COMMAND_CHECKS = [Depends(read_to_end), Depends(refuse_forms)]
"""For operations that take no body."""

_COMMAND_PROBLEMS = (
    "task-not-found",
    "request-timeout",
    "illegal-transition",
    "body-too-large",
    "unsupported-media-type",
    "unavailable",
    *CHANGE_PROBLEMS,
)


router = APIRouter(tags=["tasks"], generate_unique_id_function=operation_id)


@router.get(
    "/tasks",
    summary="List tasks",
    response_model=TaskPage,
    response_description="One page of tasks.",
    responses=problems("invalid-query", "unavailable"),
)
async def list_tasks(
    request: Request, query: Annotated[TaskQuery, Query()], db: Db, tenant_id: TenantId
) -> Response:
    """
    Newest first, without payloads and results. Pass `next_cursor` as `cursor` to get the next
    page; tasks submitted meanwhile do not shift it.
    """
    _check_repetitions(request)
    return _json(page_json(await _page(db, tenant_id, query)))


@router.get(
    "/tasks/{id}",
    summary="Get a task",
    response_model=TaskView,
    response_description="The task in its current state.",
    responses=problems("task-not-found", "unavailable"),
)
async def get_task(task_id: TaskIdText, parts: TheParts, tenant_id: TenantId) -> Response:
    """
    Everything about one task: its status, payload, result, and every attempt.
    """
    if task_id == "batch":
        raise HTTPException(405)  # A path of its own, for POST.
    task = await read.get(parts.db, tenant_id, _task_id(task_id), through_relay=parts.through_relay)
    return _json(task_json(task))


@router.post(
    "/tasks/{id}/cancel",
    dependencies=_COMMAND_CHECKS,
    summary="Cancel a task",
    response_model=TaskView,
    response_description="The task is cancelled.",
    responses={
        202: {
            "model": TaskView,
            "description": "The task is running; its worker was asked to stop it.",
        },
        **problems(*_COMMAND_PROBLEMS),
    },
)
async def cancel_task(task_id: TaskIdText, db: Db, tenant_id: TenantId) -> Response:
    """
    A waiting task is cancelled immediately. A running one may still complete before its worker
    stops it.
    """
    task = await steer.cancel(db, tenant_id, _task_id(task_id))
    return _json(task_json(task), 200 if task.state is State.CANCELLED else 202)


@router.post(
    "/tasks/{id}/run-now",
    dependencies=_COMMAND_CHECKS,
    summary="Run a waiting task now",
    status_code=202,
    response_model=TaskView,
    response_description="The task is due.",
    responses=problems(*_COMMAND_PROBLEMS),
)
async def run_task_now(task_id: TaskIdText, parts: TheParts, tenant_id: TenantId) -> Response:
    """
    Make a `SCHEDULED` or `RETRYING` task due now instead of at its `run_at`. It starts when a
    worker has a free slot. A task that is already due is left unchanged.
    """
    task = await steer.run_now(parts.db, tenant_id, _task_id(task_id))
    parts.waker.wake()
    return _json(task_json(task), 202)


@router.post(
    "/tasks/{id}/redrive",
    dependencies=_COMMAND_CHECKS,
    summary="Redrive a task",
    status_code=202,
    response_model=TaskView,
    response_description="The task is pending again.",
    responses=problems(*_COMMAND_PROBLEMS),
)
async def redrive_task(task_id: TaskIdText, parts: TheParts, tenant_id: TenantId) -> Response:
    """
    Give a failed or cancelled task a new generation: it is due now and has all its attempts
    again. To start a waiting task early, use `run-now`.
    """
    task = await steer.redrive(parts.db, tenant_id, _task_id(task_id))
    parts.waker.wake()
    return _json(task_json(task), 202)


def _check_repetitions(request: Request) -> None:
    # Otherwise the last value would silently win.
    given = Counter(name for name, _ in request.query_params.multi_items())
    repeated = [name for name, count in given.items() if count > 1 and name != "status"]
    if repeated:
        raise InvalidQuery([(name, "is given more than once") for name in repeated])


async def _page(db: Executor, tenant_id: int, query: TaskQuery) -> Page:
    try:
        return await read.list_tasks(
            db,
            tenant_id,
            statuses=query.status,
            name=query.name,
            queue=query.queue,
            cursor=query.cursor,
            limit=query.limit,
        )
    except InvalidTask as error:
        errors = [(e.pointer.removeprefix("/"), e.detail) for e in error.errors]
        raise InvalidQuery(errors) from None


def _task_id(text: str) -> UUID:
    if not _UUID.fullmatch(text):
        raise Refusal(
            "task-not-found",
            "A task id is a UUID with dashes, such as 0192f0c1-2b3c-7d4e-8f50-123456789abc.",
        )
    return UUID(text)


def _json(text: str, status: int = 200) -> Response:
    return Response(text, status, media_type="application/json")
