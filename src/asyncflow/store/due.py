"""
Due tasks, claimed or listed: from the beginning of their index, or from the low-water mark on.

The index of due tasks begins with the oldest. An entry whose task has moved on is removed by
vacuum, or marked as dead by the next scan that meets it. Neither may happen while a transaction
is open that could still see it: a forgotten session, a long report, a backup. Every scan then
steps over all tasks that have run since that transaction began; after minutes of load, millions.

A slow scan triggers a refresh of the low-water mark: per queue and priority, a moment before the
oldest pending task became due. Scans then begin there. A refresh takes as long as one scan from
the beginning and runs in the background, on a connection of its own. Until the next refresh, a
task that turns up below the mark is not found: one that was released or unqueued, or was submitted
for a time in the past. It is late by a second or by six times as long as a refresh takes, and only
while scans are slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from asyncflow.domain.task import Claim
from asyncflow.errors import StoreUnavailable
from asyncflow.store import admission, claims
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database, Executor, translated_errors
from asyncflow.telemetry import events

SLOW_SECONDS = 0.01
REFRESH_SECONDS_MAX = 60.0
"""Enough for some hundred million entries."""

Marks = list[datetime]
"""Low-water marks of a queue: one per priority, from 0 to 9."""


class Due:
    """
    Claims due tasks, or lists them for the relay, and keeps the low-water mark meanwhile.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._mark = LowWaterMark(db)

    async def claim(
        self,
        *,
        lease_id: UUID,
        worker_id: UUID,
        offers: Sequence[Offer],
        queues: Sequence[str],
        limit: int,
    ) -> list[Claim]:
        """
        Take up to `limit` due tasks; see `claims.claim_due`.
        """
        since = self._mark.since(queues=queues, names=[offer.name for offer in offers])
        with self._mark.timing():
            return await claims.claim_due(
                self._db,
                lease_id=lease_id,
                worker_id=worker_id,
                offers=offers,
                queues=queues,
                limit=limit,
                since=since,
            )

    async def admissible(
        self, db: Executor, *, queue: str, names: Sequence[str], limit: int
    ) -> list[Admitted]:
        """
        The next tasks of `queue` that may go, at most `limit`; see `admissible`.
        """
        since = self._mark.since(queues=[queue], names=names).get(queue)
        with self._mark.timing():
            return await admissible(db, queue=queue, names=names, limit=limit, since=since)

    async def aclose(self) -> None:
        """
        Stop refreshing the mark.
        """
        await self._mark.aclose()


class Admitted(NamedTuple):
    """
    A task that may be queued now.

    Attributes:
        attempt: The last one, 0 if there was none: while it is the same, the task has not been
            claimed since.
    """

    task_id: UUID
    attempt: int
    priority: int


def _admissible(*, since: str = "") -> str:
    found = admission.first_of(
        columns="t.id, t.attempt",
        queue="$1",
        priority="level.priority",
        condition=f"{admission.may_start(names='$2')} {since}",
        limit="$3",
    )
    return f"""
    -- in the order of `Admitted`
    SELECT found.id, found.attempt, level.priority
      FROM generate_series(9, 0, -1) AS level (priority)
     CROSS JOIN LATERAL ({found}) AS found
     LIMIT $3
"""


ADMISSIBLE = _admissible()

# $4 marks
ADMISSIBLE_SINCE = _admissible(since="AND t.run_at >= ($4::timestamptz[])[level.priority + 1]")


async def admissible(
    db: Executor,
    *,
    queue: str,
    names: Sequence[str],
    limit: int,
    since: Marks | None = None,
) -> list[Admitted]:
    """
    The next tasks of `queue` that may go, at most `limit`, in the order they should go.

    Locks nothing: no transaction stays open while the relay talks to RabbitMQ.

    Args:
        since: Leave out what was due before these marks.
    """
    if since is None:
        rows = await db.fetch(ADMISSIBLE, queue, list(names), limit)
    else:
        rows = await db.fetch(ADMISSIBLE_SINCE, queue, list(names), limit, since)
    return [Admitted._make(row) for row in rows]


_OLDEST = admission.first_of(
    columns="t.run_at",
    queue="open.queue",
    priority="level.priority",
    condition=admission.is_offered("$2"),
    limit="1",
)

# $1 queues, $2 names
OLDEST_PENDING = f"""
    SELECT open.queue,
           -- What is being submitted at this moment is a little older when it is there to see.
           array_agg(least(now(), oldest.run_at) - interval '1 second'
                     ORDER BY level.priority) AS marks,
           extract(epoch FROM clock_timestamp() - statement_timestamp())::float8 AS seconds
      FROM unnest($1::text[]) AS open (queue)
     CROSS JOIN generate_series(0, 9) AS level (priority)
      LEFT JOIN LATERAL ({_OLDEST}) AS oldest ON true
     GROUP BY open.queue
"""


class Measured(NamedTuple):
    """
    Low-water marks as PostgreSQL found them.

    Attributes:
        marks: Per queue; the present moment for a priority with no pending task.
        seconds: How long PostgreSQL took.
    """

    marks: dict[str, Marks]
    seconds: float


async def measure_marks(
    db: Executor, *, queues: Collection[str], names: Collection[str]
) -> Measured:
    """
    Find the moments just before the oldest pending tasks of these names became or become due.
    """
    rows = await db.fetch(OLDEST_PENDING, list(queues), list(names))
    return Measured(
        {row["queue"]: row["marks"] for row in rows},
        max((row["seconds"] for row in rows), default=0.0),
    )


class LowWaterMark:
    """
    Where the scans of one process begin.

    Args:
        slow_seconds: A scan that takes longer triggers a refresh.
        worth_seconds: If a refresh takes PostgreSQL less, there is next to nothing to step over,
            and scans begin at the beginning again.
        rest_seconds_min, rest_share: After a refresh, how long until the next one at the earliest:
            in seconds, and as a multiple of the time it took.
    """

    def __init__(
        self,
        db: Database,
        *,
        slow_seconds: float = SLOW_SECONDS,
        worth_seconds: float = 0.005,
        rest_seconds_min: float = 1.0,
        rest_share: float = 5.0,
    ) -> None:
        self._db = db
        self._slow_seconds = slow_seconds
        self._worth_seconds = worth_seconds
        self._rest_seconds_min = rest_seconds_min
        self._rest_share = rest_share
        self._names: dict[str, frozenset[str]] = {}
        self._marks: Mapping[str, Marks] = {}
        self._was_slow = False
        self._refreshing: asyncio.Task[None] | None = None
        self._again_at = 0.0

    def since(self, *, queues: Sequence[str], names: Sequence[str]) -> Mapping[str, Marks]:
        """
        The marks of these queues and maybe others; empty to scan from the beginning.
        """
        offered = frozenset(names)
        if any(self._names.get(queue) != offered for queue in queues):
            self._offer(queues, offered)
        is_free = self._refreshing is None and time.monotonic() >= self._again_at
        if is_free and (self._marks or self._was_slow):
            self._was_slow = False
            self._refreshing = asyncio.create_task(self._refresh(dict(self._names)))
        return self._marks if all(queue in self._marks for queue in queues) else {}

    def _offer(self, queues: Sequence[str], names: frozenset[str]) -> None:
        # Of a name that was not offered there, pending tasks may be older than the mark.
        changed = {queue for queue in queues if self._names.get(queue) != names}
        self._names |= dict.fromkeys(changed, names)
        self._marks = {queue: marks for queue, marks in self._marks.items() if queue not in changed}

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """
        Time a scan, also one that fails.
        """
        began = time.monotonic()
        try:
            yield
        finally:
            self.note(scan_seconds=time.monotonic() - began)

    def note(self, *, scan_seconds: float) -> None:
        """
        Remember how long a scan took.
        """
        self._was_slow |= scan_seconds > self._slow_seconds

    async def aclose(self) -> None:
        """
        Stop refreshing.
        """
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.wait([self._refreshing])

    async def _refresh(self, names: Mapping[str, frozenset[str]]) -> None:
        began = time.monotonic()
        try:
            measured = await self._measure(names)
            # Not for a queue where other names are offered by now.
            self._marks = {
                queue: marks
                for queue, marks in measured.marks.items()
                if measured.seconds > self._worth_seconds and self._names[queue] == names[queue]
            }
        except StoreUnavailable as error:
            # The marks from before still serve.
            events.database_unavailable(where="low-water mark", reason=str(error))
        finally:
            took = time.monotonic() - began
            rest_seconds = max(self._rest_seconds_min, self._rest_share * took)
            self._again_at = time.monotonic() + rest_seconds
            self._refreshing = None

    async def _measure(self, names: Mapping[str, frozenset[str]]) -> Measured:
        connection = await self._db.connect("low-water mark", timeout_seconds=REFRESH_SECONDS_MAX)
        try:
            with translated_errors():
                return await measure_marks(
                    connection, queues=names.keys(), names=frozenset().union(*names.values())
                )
        finally:
            connection.terminate()
