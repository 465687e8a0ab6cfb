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
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from asyncflow.aio.batching import Batcher
from asyncflow.api.batch import Refused, read_batch, together
from asyncflow.api.body import read_json_body
from asyncflow.api.catalogue import Catalogue
from asyncflow.api.field_errors import refused_document
from asyncflow.api.problems import as_json, invalid_document
from asyncflow.api.views import submitted_json
from asyncflow.domain.task import DEFAULT_TENANT_ID, NewTask, TaskIds
from asyncflow.errors import FieldError, InvalidPayload, InvalidTask
from asyncflow.jsontext import parse
from asyncflow.store import submit
from asyncflow.store.database import Executor
from asyncflow.store.wakeups import Waker
from asyncflow.wire.submissions import SubmitTask

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
        root_path: Before every path of ours, as clients know them.
    """

    def __init__(
        self,
        db: Executor,
        catalogue: Catalogue,
        waker: Waker,
        *,
        body_bytes_max: int,
        payload_bytes_max: int,
        root_path: str = "",
    ) -> None:
        self._db = db
        self._catalogue = catalogue
        self._waker = waker
        self._body_bytes_max = body_bytes_max
        self._payload_bytes_max = payload_bytes_max
        self._location = f"{root_path}/tasks/".encode()
        self._ids = TaskIds()
        self._batcher: Batcher[NewTask, submit.Submitted] = Batcher(
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
        task = self._new_task(_wanted(parse(body)))
        submitted = await self._batcher.submit(task)
        self._wake_for([submitted])
        await _send_accepted(send, submitted_json(task, submitted), self._header(task))

    async def submit_batch(self, request: Request) -> Response:
        """
        Submit up to 1000 tasks together: all are stored, or none; with `partial`, those that can.

        They are answered in the order given.
        """
        body = await read_json_body(request.scope, request.receive, bytes_max=self._body_bytes_max)
        wanted, partial = read_batch(body)
        rows = [self._checked(row, number) for number, row in enumerate(wanted)]
        tasks = [row for row in rows if isinstance(row, NewTask)]
        refusals = {n: row for n, row in enumerate(rows) if not isinstance(row, NewTask)}
        if refusals and not partial:
            raise together(list(refusals.values()))
        submitted = await self._store(tasks)
        self._wake_for(submitted)
        stored = iter(map(submitted_json, tasks, submitted))
        views = ",".join("null" if n in refusals else next(stored) for n in range(len(rows)))
        path = request.scope["path"]
        refused = [
            {"index": n, "problem": invalid_document(error, path)} for n, error in refusals.items()
        ]
        return Response(
            b'{"tasks":[%b],"refused":%b}' % (views.encode(), as_json(refused)),
            207 if refused else 202,
            media_type="application/json",
        )

    async def _store(self, tasks: Sequence[NewTask]) -> list[submit.Submitted]:
        return await submit.submit(self._db, tasks)

    def _checked(self, row: SubmitTask | Refused, number: int) -> NewTask | Refused:
        if not isinstance(row, SubmitTask):
            return row
        try:
            return self._new_task(row, f"/tasks/{number}")
        except (InvalidTask, InvalidPayload) as error:
            return error

    def _new_task(self, wanted: SubmitTask, pointer: str = "") -> NewTask:
        queue = self._catalogue.queue_for(
            wanted.name, wanted.payload, wanted=wanted.queue, pointer=f"{pointer}/payload"
        )
        _check_expiry(wanted, pointer)
        return NewTask(
            **{
                **vars(wanted),
                "id": self._ids.next(),
                "tenant_id": DEFAULT_TENANT_ID,
                "queue": queue,
                "payload": self._payload_text(wanted.payload, pointer),
                "delay_seconds": wanted.delay_seconds or 0.0,
            }
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
            raise InvalidTask([FieldError(f"{pointer}/payload", detail)])
        return text

    def _header(self, task: NewTask) -> tuple[bytes, bytes]:
        return b"location", self._location + str(task.id).encode()

    def _wake_for(self, submitted: Sequence[submit.Submitted]) -> None:
        # After the commit; a task that is due later is found by polling.
        if any(task.run_at <= task.created_at for task in submitted):
            self._waker.wake()


def _wanted(document: Any) -> SubmitTask:
    try:
        return SubmitTask.model_validate(document)
    except ValidationError as error:
        raise refused_document(error.errors(include_url=False), SubmitTask) from None


def _check_expiry(wanted: SubmitTask, pointer: str) -> None:
    # By this machine's clock, to catch mistakes; the database's clock decides in the end.
    if wanted.expires_at is None:
        return
    starts_at = datetime.now(UTC) + timedelta(seconds=wanted.delay_seconds or 0.0)
    if wanted.expires_at <= starts_at:
        moment = "the end of `delay_seconds`" if wanted.delay_seconds else "now"
        raise InvalidTask([FieldError(f"{pointer}/expires_at", f"must be later than {moment}")])


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
