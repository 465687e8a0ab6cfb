"""
What workers published about their handlers, as the API uses it: the default queue of a
name, and the JSON Schema of its payload.

A copy in memory, refreshed in the background: no submission waits for it, and an outage of
the database leaves the last copy in use. A worker checks the payload again, so an old copy
can make the API too generous or too strict for a moment, never a task wrong. Names that no
worker ever published are taken as they are.

`format` is not asserted: Pydantic in the worker knows better what it accepts as a date.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jsonschema_rs

from asyncflow.api.faults import payload_faults
from asyncflow.api.strict_json import first_faults
from asyncflow.errors import InvalidPayload, StoreUnavailable
from asyncflow.store.database import Executor
from asyncflow.store.workers import published_handlers
from asyncflow.telemetry import events

REFRESH_SECONDS = 2.0


class _Known(NamedTuple):
    queue: str
    payload_schema: Mapping[str, Any]
    validator: jsonschema_rs.Validator | None


class Catalogue:
    """
    The handlers known to this process. Enter it to keep it fresh.

    Entering waits for a first look at the database, and goes on without it when that fails.
    """

    def __init__(self, db: Executor, *, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._db = db
        self._refresh_seconds = refresh_seconds
        self._known: dict[str, _Known] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Catalogue:
        await self._try_refresh()
        self._task = asyncio.get_running_loop().create_task(self._keep_fresh())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def queue_of(self, name: str) -> str | None:
        """
        The queue the handler of this name asks for; None if the name is unknown.
        """
        known = self._known.get(name)
        return known.queue if known else None

    def check_payload(self, name: str, payload: dict[str, Any], *, pointer: str) -> None:
        """
        Return if the payload fits what the handler of this name takes, or the name is unknown.

        Args:
            pointer: Where the payload is in the document, for the faults.

        Raises:
            InvalidPayload: It does not fit.
        """
        known = self._known.get(name)
        if known is None or known.validator is None or known.validator.is_valid(payload):
            return
        errors = known.validator.iter_errors(payload)
        faults, count = first_faults(payload_faults(errors, pointer))
        raise InvalidPayload(name, faults, count=count)

    async def refresh(self) -> None:
        """
        Read what is published now.

        Raises:
            StoreUnavailable: The copy stays as it was.
        """
        published = await published_handlers(self._db)
        self._known = {
            handler.name: self._learned(handler.name, handler.queue, handler.payload_schema)
            for handler in published
        }

    def _learned(self, name: str, queue: str, schema: Mapping[str, Any]) -> _Known:
        before = self._known.get(name)
        if before is not None and before.payload_schema == schema:
            return before._replace(queue=queue)
        return _Known(queue, schema, _validator(name, schema))

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            await self._try_refresh()

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except StoreUnavailable as error:
            events.database_unavailable(where="catalogue", reason=str(error))


def _validator(name: str, schema: Mapping[str, Any]) -> jsonschema_rs.Validator | None:
    try:
        # Offline: a schema must not make this process fetch an address of its choice.
        return jsonschema_rs.validator_for(dict(schema), validate_formats=False, offline=True)
    except (jsonschema_rs.ValidationError, ValueError) as error:
        # The handler's worker still checks every payload; refusing all of them would be worse.
        events.payload_schema_unusable(name=name, reason=str(error).partition("\n")[0])
        return None
