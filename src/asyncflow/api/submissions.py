"""
From a submission to a stored task: what the handler accepts, in which queue, within which limits.

While one INSERT is under way, the submissions that arrive meanwhile form the next one. Callers
answer only after the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from asyncflow.aio.batching import Batcher
from asyncflow.api.catalogue import Catalogue
from asyncflow.domain.task import NewTask, TaskIds
from asyncflow.errors import FieldError, InvalidTask
from asyncflow.jsontext import encode, utf8_length
from asyncflow.store import submit as store
from asyncflow.store.database import Executor
from asyncflow.store.wakeups import Waker
from asyncflow.wire.submissions import SubmitTask

IN_FLIGHT_MAX = 2
BATCH_SIZE_MAX = 500
BATCH_BYTES_MAX = 4 * 1024 * 1024


class Submissions:
    """
    Prepares and stores submitted tasks.

    Args:
        payload_bytes_max: Largest payload of one task, in bytes of compact JSON.
    """

    def __init__(
        self, db: Executor, catalogue: Catalogue, waker: Waker, *, payload_bytes_max: int
    ) -> None:
        self._db = db
        self._catalogue = catalogue
        self._waker = waker
        self._payload_bytes_max = payload_bytes_max
        self._ids = TaskIds()
        self._batcher: Batcher[NewTask, store.Submitted] = Batcher(
            self._store,
            size_max=BATCH_SIZE_MAX,
            weigh=lambda task: len(task.payload),
            weight_max=BATCH_BYTES_MAX,
            in_flight_max=IN_FLIGHT_MAX,
        )

    def new_task(self, wanted: SubmitTask, tenant_id: int, pointer: str = "") -> NewTask:
        """
        The task to store.

        Args:
            pointer: Where `wanted` is in the document, for the errors.

        Raises:
            InvalidPayload: No handler of this name accepts the payload.
            InvalidTask: It breaks another rule.
        """
        queue = self._catalogue.queue_for(
            wanted.name, wanted.payload, wanted=wanted.queue, pointer=f"{pointer}/payload"
        )
        _check_expiry(wanted, pointer)
        return NewTask(
            **{
                **vars(wanted),
                "id": self._ids.next(),
                "tenant_id": tenant_id,
                "queue": queue,
                "payload": self._payload_text(wanted.payload, pointer),
                "delay_seconds": wanted.delay_seconds or 0.0,
            }
        )

    async def submit(self, task: NewTask) -> store.Submitted:
        """
        Store a task together with what else arrives meanwhile.
        """
        submitted = await self._batcher.submit(task)
        self._wake_for([submitted])
        return submitted

    async def submit_all(self, tasks: Sequence[NewTask]) -> list[store.Submitted]:
        """
        Store tasks in one transaction, in the order given.
        """
        submitted = await self._store(tasks)
        self._wake_for(submitted)
        return submitted

    async def _store(self, tasks: Sequence[NewTask]) -> list[store.Submitted]:
        return await store.submit(self._db, tasks)

    def _payload_text(self, payload: dict[str, Any], pointer: str) -> str:
        if not payload:
            return "{}"
        text = encode(payload)
        size = utf8_length(text)
        if size > self._payload_bytes_max:
            detail = (
                f"takes {size} bytes as compact JSON; at most {self._payload_bytes_max} are "
                "accepted. Store large inputs elsewhere and send their location"
            )
            raise InvalidTask([FieldError(f"{pointer}/payload", detail)])
        return text

    def _wake_for(self, submitted: Sequence[store.Submitted]) -> None:
        # After the commit; a task that is due later is found by polling.
        if any(task.run_at <= task.created_at for task in submitted):
            self._waker.wake()


def _check_expiry(wanted: SubmitTask, pointer: str) -> None:
    # By this machine's clock, to catch mistakes; the database's clock decides in the end.
    if wanted.expires_at is None:
        return
    starts_at = datetime.now(UTC) + timedelta(seconds=wanted.delay_seconds or 0.0)
    if wanted.expires_at <= starts_at:
        moment = "the end of `delay_seconds`" if wanted.delay_seconds else "now"
        raise InvalidTask([FieldError(f"{pointer}/expires_at", f"must be later than {moment}")])
