"""
What workers published about their handlers: the default queue of a name, and the JSON Schema of
its payload.

The catalogue is a copy in memory, refreshed in the background: no submission waits for it, and
during an outage of the database the last copy is used. A worker checks the payload again, so an
old copy can make the API too lenient or too strict for a moment, but no task wrong. Names that no
worker has published are accepted as they are.

Names are global. If live workers declare one name with different payloads, most likely in two
services, a payload that one of them accepts goes to its queue, and a warning names both.

`format` is not asserted: Pydantic in the worker knows better what it accepts as a date.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jsonschema_rs

from asyncflow.aio.background import Background
from asyncflow.api.field_errors import payload_errors
from asyncflow.domain.policy import DEFAULT_POLICY
from asyncflow.errors import InvalidPayload, StoreUnavailable
from asyncflow.jsontext import encode, first_errors
from asyncflow.store.database import Executor
from asyncflow.store.workers import Published, published_handlers
from asyncflow.telemetry import events

REFRESH_SECONDS = 2.0

COMMAS_MAX = 2_000
"""If a payload has more, only its first error is reported: finding each one takes 40 µs."""


class _Known(NamedTuple):
    queue: str
    payload_schema: Mapping[str, Any]
    validator: jsonschema_rs.Validator | None


class Catalogue:
    """
    The handlers known to this process. Enter it to keep it fresh.

    Entering waits for the first refresh, and continues without it if the database is unavailable.
    """

    def __init__(self, db: Executor, *, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._db = db
        self._refresh_seconds = refresh_seconds
        self._known: dict[str, list[_Known]] = {}
        self._conflicts: set[str] = set()
        self._background = Background(self._keep_fresh)

    async def __aenter__(self) -> Catalogue:
        await self._try_refresh()
        self._background.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._background.stop()

    def queue_for(
        self, name: str, payload: dict[str, Any], *, wanted: str | None, pointer: str
    ) -> str:
        """
        The queue for a task of this name: the one its submitter wants, or else that of the
        handler that accepts its payload; `default` if the name is unknown.

        Args:
            pointer: The payload's place in the document, for the errors.

        Raises:
            InvalidPayload: No handler of this name accepts the payload.
        """
        handlers = self._known.get(name)
        if handlers is None:
            return wanted or DEFAULT_POLICY.queue
        if wanted is not None and len(handlers) > 1:
            handlers = [handler for handler in handlers if handler.queue == wanted] or handlers
        for handler in handlers:
            if handler.validator is None or handler.validator.is_valid(payload):
                return wanted or handler.queue
        assert handlers[0].validator is not None
        found = _errors(handlers[0].validator, payload)
        errors, count = first_errors(payload_errors(found, pointer))
        raise InvalidPayload(name, errors, count=count)

    async def refresh(self) -> None:
        """
        Read what is published now.

        Raises:
            StoreUnavailable: The copy stays as it was.
        """
        by_name: defaultdict[str, list[Published]] = defaultdict(list)
        for handler in await published_handlers(self._db):
            by_name[handler.name].append(handler)
        self._known = {name: self._learned(name, found) for name, found in by_name.items()}
        self._report_conflicts()

    def _learned(self, name: str, published: Sequence[Published]) -> list[_Known]:
        # A handler without live workers stays known, unless there is another of its name that has
        # some: most likely its queue was changed.
        live = [handler for handler in published if handler.is_live] or published[:1]
        before = {known.queue: known for known in self._known.get(name, ())}
        return [
            before[handler.queue]
            if handler.queue in before
            and before[handler.queue].payload_schema == handler.payload_schema
            else _Known(
                handler.queue, handler.payload_schema, _validator(name, handler.payload_schema)
            )
            for handler in live
        ]

    def _report_conflicts(self) -> None:
        conflicts = {
            name: [handler.queue for handler in handlers]
            for name, handlers in self._known.items()
            if any(h.payload_schema != handlers[0].payload_schema for h in handlers)
        }
        for name in conflicts.keys() - self._conflicts:
            events.handlers_conflict(name=name, queues=conflicts[name])
        self._conflicts = set(conflicts)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            await self._try_refresh()

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except StoreUnavailable as error:
            events.database_unavailable(where="catalogue", reason=str(error))


def _errors(
    validator: jsonschema_rs.Validator, payload: dict[str, Any]
) -> Iterator[jsonschema_rs.ValidationError]:
    if encode(payload).count(",") <= COMMAS_MAX:
        yield from validator.iter_errors(payload)
        return
    try:
        validator.validate(payload)
    except jsonschema_rs.ValidationError as error:
        yield error


def _validator(name: str, schema: Mapping[str, Any]) -> jsonschema_rs.Validator | None:
    try:
        # Offline: a schema must not make this process fetch an address of its choice.
        return jsonschema_rs.validator_for(dict(schema), validate_formats=False, offline=True)
    except (jsonschema_rs.ValidationError, ValueError) as error:
        # The handler's worker still checks every payload; refusing all of them would be worse.
        events.payload_schema_unusable(name=name, reason=str(error).partition("\n")[0])
        return None
