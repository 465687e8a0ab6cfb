"""
What routes are given: the parts of the process that serve them, and who sends the request.

    async def get_task(task_id: TaskIdText, db: Db, tenant_id: TenantId) -> Response: ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from asyncflow.api.front.authentication import PRINCIPAL
from asyncflow.api.submissions import Submissions
from asyncflow.store.database import Executor
from asyncflow.store.wakeups import Waker


@dataclass(frozen=True, slots=True)
class Parts:
    """
    What serves the requests of one process.

    Attributes:
        through_relay: Whether tasks reach workers through the relay and RabbitMQ.
    """

    db: Executor
    waker: Waker
    submissions: Submissions
    through_relay: bool


# Coroutines, because FastAPI runs plain functions in threads.


async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


async def _db(request: Request) -> Executor:
    return (await _parts(request)).db


async def _tenant_id(request: Request) -> int:
    tenant_id: int = request.scope[PRINCIPAL].tenant_id
    return tenant_id


TheParts = Annotated[Parts, Depends(_parts)]
Db = Annotated[Executor, Depends(_db)]
TenantId = Annotated[int, Depends(_tenant_id)]
