"""
Notices tasks that no live worker offers: a worker that was not deployed, a queue with a typing
mistake. Nothing else would tell.
"""

from __future__ import annotations

from asyncflow.store import unserved as store
from asyncflow.store.database import Executor
from asyncflow.telemetry import events

SAMPLE = 1_000
DUE_FOR_SECONDS = 30.0
"""Longer than workers take to be replaced."""

NAMED_MAX = 20


class UnservedWatch:
    """
    Says so in the log, once when tasks begin to wait for nobody and once when they no longer do.
    """

    def __init__(self, *, due_for_seconds: float = DUE_FOR_SECONDS) -> None:
        self._due_for_seconds = due_for_seconds
        self._known: set[tuple[str, str]] = set()

    async def look(self, db: Executor) -> int:
        """
        Look once; returns 0, since it touches no task.
        """
        found = await store.unserved(db, sample=SAMPLE, due_for_seconds=self._due_for_seconds)
        # A new name for every task, say, must not fill the log.
        named = {(waiting.queue, waiting.name): waiting for waiting in found[:NAMED_MAX]}
        for key in named.keys() - self._known:
            waiting = named[key]
            events.tasks_unserved(
                queue=waiting.queue,
                name=waiting.name,
                count=waiting.count,
                is_more=waiting.count >= SAMPLE,
                waiting_seconds=waiting.waiting_seconds,
            )
        still = {(waiting.queue, waiting.name) for waiting in found}
        for queue, name in self._known - still:
            events.tasks_served(queue=queue, name=name)
        self._known = (self._known & still) | named.keys()
        return 0
