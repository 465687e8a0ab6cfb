"""
From when on to look for due tasks: from the beginning, unless that has become slow.

The index of due tasks begins with the oldest. An entry whose task has moved on is removed by
vacuum, or marked as dead by the next look that meets it; but neither may happen while somebody
keeps a transaction open that could still see it: a forgotten session, a long report, a backup.
Every look then steps over all tasks that have run since that transaction began, after minutes of
load over millions.

A look that takes long is the sign. Then it is worth finding out once in a while when the oldest
task that is still pending became due, which takes as long as one look from the beginning, and
beginning there. Meanwhile a task that turns up with an older `run_at` is not met until the next
time: one that was released or unqueued, or was submitted for a time in the past. That is late by a
second or by six times as long as finding out takes, and only while looks are slow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from asyncflow.errors import StoreUnavailable
from asyncflow.store.database import Database, Executor, translated_errors
from asyncflow.telemetry import events

SLOW_SECONDS = 0.01
"""A look that takes longer is suspicious."""

WORTH_SECONDS = 0.005
"""If PostgreSQL finds out in less, there is next to nothing to step over."""

REST_SECONDS_MIN = 1.0
REST_SHARE = 5
"""Finding out rests so many times as long as it took."""

FINDING_SECONDS_MAX = 60.0
"""Enough for some hundred million entries."""

FIRST_DUE = """
    SELECT open.queue,
           -- What is being submitted at this moment is a little older when it is there to see.
           array_agg(least(now(), oldest.run_at) - interval '1 second'
                     ORDER BY level.priority) AS moments,
           extract(epoch FROM clock_timestamp() - statement_timestamp())::float8 AS seconds
      FROM unnest($1::text[]) AS open (queue)
     CROSS JOIN generate_series(0, 9) AS level (priority)
      LEFT JOIN LATERAL (
           SELECT t.run_at
             FROM asyncflow.tasks_live t
            WHERE t.queued_at IS NULL AND t.lease_id IS NULL   -- pending; index tasks_due
              AND t.queue = open.queue
              AND t.priority = level.priority
              AND t.name = ANY ($2)
            ORDER BY t.run_at, t.id
            LIMIT 1) AS oldest ON true
     GROUP BY open.queue
"""


Moments = list[datetime]
"""One per priority, from 0 to 9."""


class FirstDue(NamedTuple):
    """
    Attributes:
        moments: Per queue and priority, a moment before the oldest pending task becomes due; the
            present one if there is none.
        seconds: How long PostgreSQL took to find out.
    """

    moments: dict[str, Moments]
    seconds: float


async def first_due(db: Executor, *, queues: Collection[str], names: Collection[str]) -> FirstDue:
    """
    Find out when the oldest pending task of these names became or becomes due.
    """
    rows = await db.fetch(FIRST_DUE, list(queues), list(names))
    return FirstDue(
        {row["queue"]: row["moments"] for row in rows},
        max((row["seconds"] for row in rows), default=0.0),
    )


class Asked(NamedTuple):
    """
    Where is looked, and for what.
    """

    queues: frozenset[str]
    names: frozenset[str]


class Lookback:
    """
    Where the looks of one process begin. It finds out in the background, on a connection of its
    own: looks go on meanwhile.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._asked = Asked(frozenset(), frozenset())
        self._since: Mapping[str, Moments] = {}
        self._was_slow = False
        self._finding: asyncio.Task[None] | None = None
        self._again_at = 0.0

    def since(self, *, queues: Sequence[str], names: Sequence[str]) -> Mapping[str, Moments]:
        """
        Per queue and priority, from when on to look; empty: from the beginning.
        """
        asked = Asked(frozenset(queues), frozenset(names))
        if asked != self._asked:
            # Somebody offers a name that nobody did: its tasks may be old.
            self._asked, self._since = asked, {}
        is_free = self._finding is None and time.monotonic() >= self._again_at
        if is_free and (self._since or self._was_slow):
            self._was_slow = False
            self._finding = asyncio.create_task(self._find_out(asked))
        return self._since

    def note(self, *, look_seconds: float) -> None:
        """
        Remember how long a look took, also one that failed.
        """
        self._was_slow |= look_seconds > SLOW_SECONDS

    async def aclose(self) -> None:
        """
        Find out no more.
        """
        if self._finding is not None:
            self._finding.cancel()
            await asyncio.wait([self._finding])

    async def _find_out(self, asked: Asked) -> None:
        began = time.monotonic()
        try:
            connection = await self._db.connect("lookback", timeout_seconds=FINDING_SECONDS_MAX)
            try:
                with translated_errors():
                    found = await first_due(connection, queues=asked.queues, names=asked.names)
            finally:
                connection.terminate()
            if asked == self._asked:
                self._since = found.moments if found.seconds > WORTH_SECONDS else {}
        except StoreUnavailable as error:
            # What was found before still serves.
            events.database_unavailable(where="lookback", reason=str(error))
        finally:
            ended = time.monotonic()
            self._again_at = ended + max(REST_SECONDS_MIN, REST_SHARE * (ended - began))
            self._finding = None
