"""
Notices tasks that no live worker offers: a worker was not deployed, or a queue's name is misspelt.
Nothing else would report it.
"""

from __future__ import annotations

from asyncflow.store import unserved as store
from asyncflow.store.database import Executor
from asyncflow.telemetry import events

SAMPLE = 1_000
DUE_FOR_SECONDS = 30.0
"""Longer than a rolling deployment leaves a name without a worker."""

NAMED_MAX = 20


class UnservedWatch:
    """
    Logs when tasks start to wait without a worker that offers them, and when that ends.
    """

    def __init__(self, *, due_for_seconds: float = DUE_FOR_SECONDS) -> None:
        self._due_for_seconds = due_for_seconds
        self._known: set[tuple[str, str]] = set()

    async def check(self, db: Executor) -> int:
        """
        Check once; returns 0, since it changes no task.
        """
        found = await store.unserved(db, sample=SAMPLE, due_for_seconds=self._due_for_seconds)
        # Bounded: an application that gives every task a new name must not fill the log.
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
