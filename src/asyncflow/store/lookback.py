"""
From when on to look for due tasks: from the beginning, unless that has become slow.

The index of due tasks begins with the oldest. An entry whose task has moved on is removed by
vacuum, or marked as dead by the next look that meets it; but neither may happen while somebody
keeps a transaction open that could still see it: a forgotten session, a long report, a backup.
Every look then steps over all tasks that have run since that transaction began, after minutes of
load over millions.

A look that takes long is the sign. Then it is worth finding out once in a while when the oldest
task that is still pending became due, which takes as long as one such look, and beginning there. A
task that comes back to pending with an older `run_at`, as released ones do, is not met until the
next time. That is late by a second or so, never wrong, and only while looks are slow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from asyncflow.store.database import Executor

SLOW_SECONDS = 0.01
"""A look that takes longer is suspicious."""

WORTH_SECONDS = 0.005
"""If finding out takes less, there is next to nothing to step over."""

REST_SECONDS_MIN = 1.0
REST_SHARE = 5
"""Finding out rests so many times as long as it took."""

FIRST_DUE = """
    SELECT open.queue,
           -- What is being submitted at this moment is a little older when it is there to see.
           array_agg(least(now(), oldest.run_at) - interval '1 second'
                     ORDER BY level.priority) AS moments
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


async def first_due(
    db: Executor, *, queues: Sequence[str], names: Sequence[str]
) -> dict[str, Moments]:
    """
    Per queue and priority, a moment before the oldest pending task of these names becomes due; the
    present one if there is none.
    """
    rows = await db.fetch(FIRST_DUE, list(queues), list(names))
    return {row["queue"]: row["moments"] for row in rows}


class Lookback:
    """
    Where the looks of one claimant, or of the relay into one queue, begin.
    """

    def __init__(self) -> None:
        self._since: dict[str, Moments] = {}
        self._look_seconds = 0.0
        self._again_at = 0.0

    async def since(
        self, db: Executor, *, queues: Sequence[str], names: Sequence[str]
    ) -> Mapping[str, Moments]:
        """
        Per queue and priority, from when on to look; empty: from the beginning.

        Raises:
            StoreUnavailable: See `Database.fetch`.
        """
        began = time.monotonic()
        is_suspicious = bool(self._since) or self._look_seconds > SLOW_SECONDS
        if is_suspicious and began >= self._again_at:
            try:
                found = await first_due(db, queues=queues, names=names)
            finally:
                # Also if it took so long that it failed: what was found before still serves.
                ended = time.monotonic()
                self._again_at = ended + max(REST_SECONDS_MIN, REST_SHARE * (ended - began))
            self._since = found if ended - began > WORTH_SECONDS else {}
        return self._since

    def note(self, *, look_seconds: float) -> None:
        """
        Remember how long the last look took.
        """
        self._look_seconds = look_seconds
