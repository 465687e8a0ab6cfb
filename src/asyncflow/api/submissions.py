"""
Taking tasks in: `POST /tasks` and `POST /tasks/batch`.

`POST /tasks` is the hot path, so it is a bare ASGI endpoint: no dependency solving, no
response model. While one INSERT is under way, the submissions that arrive meanwhile form
the next one. The 202 goes out only after the commit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asyncflow.api.body import read_json_body
from asyncflow.api.catalogue import Catalogue
from asyncflow.api.faults import document_faults
from asyncflow.api.strict_json import FAULTS_MAX, parse
from asyncflow.api.views import submitted_json
from asyncflow.batching import Batcher
from asyncflow.domain.task import DEFAULT_TENANT_ID, NewTask, TaskIds
from asyncflow.errors import Fault, InvalidPayload, InvalidTask
from asyncflow.store import tasks as store
from asyncflow.store.database import Executor
from asyncflow.store.wakeups import Waker
from asyncflow.wire import SubmitBatch, SubmitTask

Model = TypeVar("Model", bound=BaseModel)

IN_FLIGHT_MAX = 2
BATCH_SIZE_MAX = 500
BATCH_BYTES_MAX = 4 * 1024 * 1024

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Submissions:
    """
    The endpoints that take tasks in.

    Args:
        body_bytes_max: Largest body, in bytes.
        payload_bytes_max: Largest payload of one task, in bytes of compact JSON.
    """

    def __init__(
        self,
        db: Executor,
        catalogue: Catalogue,
        waker: Waker,
        *,
        body_bytes_max: int,
        payload_bytes_max: int,
    ) -> None:
        self._db = db
        self._catalogue = catalogue
        self._waker = waker
        self._body_bytes_max = body_bytes_max
        self._payload_bytes_max = payload_bytes_max
        self._ids = TaskIds()
        self._batcher: Batcher[NewTask, store.Submitted] = Batcher(
            self._store,
            size_max=BATCH_SIZE_MAX,
            weigh=lambda task: len(task.payload),
            weight_max=BATCH_BYTES_MAX,
            in_flight_max=IN_FLIGHT_MAX,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        `POST /tasks`.
        """
        body = await read_json_body(scope, receive, bytes_max=self._body_bytes_max)
        task = self._new_task(_validated(SubmitTask, parse(body)))
        submitted = await self._batcher.submit(task)
        self._wake_for([submitted])
        await _send_accepted(send, submitted_json(task, submitted), _location(task))

    async def submit_batch(self, request: Request) -> Response:
        """
        Submit up to 1000 tasks together: all are stored, or none.

        They are answered in the order given.
        """
        body = await read_json_body(request.scope, request.receive, bytes_max=self._body_bytes_max)
        batch = _validated(SubmitBatch, parse(body))
        tasks = self._new_tasks(batch.tasks)
        submitted = await self._store(tasks)
        self._wake_for(submitted)
        views = ",".join(map(submitted_json, tasks, submitted))
        return Response(f'{{"tasks":[{views}]}}', 202, media_type="application/json")

    async def _store(self, tasks: Sequence[NewTask]) -> list[store.Submitted]:
        return await store.submit(self._db, tasks)

    def _new_tasks(self, wanted: Sequence[SubmitTask]) -> list[NewTask]:
        tasks: list[NewTask] = []
        faults: list[Fault] = []
        for number, task in enumerate(wanted):
            try:
                tasks.append(self._new_task(task, f"/tasks/{number}"))
            except (InvalidTask, InvalidPayload) as error:
                faults += error.faults
        if faults:
            raise InvalidTask(faults[:FAULTS_MAX])
        return tasks

    def _new_task(self, wanted: SubmitTask, pointer: str = "") -> NewTask:
        queue = self._catalogue.queue_for(
            wanted.name, wanted.payload, wanted=wanted.queue, pointer=f"{pointer}/payload"
        )
        _check_expiry(wanted, pointer)
        return NewTask(
            id=self._ids.next(),
            tenant_id=DEFAULT_TENANT_ID,
            name=wanted.name,
            queue=queue,
            priority=wanted.priority,
            payload=self._payload_text(wanted.payload, pointer),
            run_at=wanted.run_at,
            delay_seconds=wanted.delay_seconds or 0.0,
            expires_at=wanted.expires_at,
            max_attempts=wanted.max_attempts,
            timeout_seconds=wanted.timeout_seconds,
        )

    def _payload_text(self, payload: dict[str, Any], pointer: str) -> str:
        if not payload:
            return "{}"
        text = _encode(payload)
        size = len(text) if text.isascii() else len(text.encode())
        if size > self._payload_bytes_max:
            detail = (
                f"takes {size} bytes as compact JSON; at most {self._payload_bytes_max} are "
                "kept. Store large inputs elsewhere and send where they are"
            )
            raise InvalidTask([Fault(f"{pointer}/payload", detail)])
        return text

    def _wake_for(self, submitted: Sequence[store.Submitted]) -> None:
        # After the commit; a task that is due later is found by polling.
        if any(task.run_at <= task.created_at for task in submitted):
            self._waker.wake()


def _validated(model: type[Model], document: Any) -> Model:
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InvalidTask(document_faults(error, model)) from None


def _check_expiry(wanted: SubmitTask, pointer: str) -> None:
    # By this machine's clock, to catch mistakes; the database's clock decides in the end.
    if wanted.expires_at is None:
        return
    starts_at = datetime.now(UTC) + timedelta(seconds=wanted.delay_seconds or 0.0)
    if wanted.expires_at <= starts_at:
        moment = "the end of `delay_seconds`" if wanted.delay_seconds else "now"
        raise InvalidTask([Fault(f"{pointer}/expires_at", f"must be later than {moment}")])


def _location(task: NewTask) -> tuple[bytes, bytes]:
    return b"location", b"/tasks/%b" % str(task.id).encode()


async def _send_accepted(send: Send, text: str, header: tuple[bytes, bytes]) -> None:
    # What Starlette's `Response` would send, at a third of its cost.
    body = text.encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        header,
    ]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": body})
