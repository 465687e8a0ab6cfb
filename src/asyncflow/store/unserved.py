"""
Tasks that are due and that no live worker offers: they wait until such a worker starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from asyncflow.store.admission import IS_PENDING, first_of, is_paused
from asyncflow.store.database import Executor
from asyncflow.store.workers import HAS_NOT_ENDED


@dataclass(frozen=True, slots=True)
class Unserved:
    """
    Tasks of one name on one queue that no worker runs.

    Attributes:
        count: How many, among the oldest `sample` per priority of the queue.
        waiting_seconds: How long the oldest has been due.
    """

    queue: str
    name: str
    count: int
    waiting_seconds: float


QUEUES_MAX = 1_000

_OLDEST = first_of(
    columns="t.queue, t.name, t.run_at",
    queue="waiting.queue",
    priority="level.priority",
    condition="t.run_at <= now() - $2 * interval '1 second'",
    limit="$1",
)

# $1 how many of a queue's oldest tasks to read, per priority; $2 due for how long. Tasks that no
# worker runs stay ahead of those that are run, so the oldest are enough.
UNSERVED = f"""
    WITH RECURSIVE waiting (queue) AS (
        -- Each queue in one step by index tasks_due, however many tasks it holds.
        (SELECT t.queue
           FROM asyncflow.tasks_live t
          WHERE {IS_PENDING}
          ORDER BY t.queue
          LIMIT 1)
         UNION ALL
        SELECT (SELECT t.queue
                  FROM asyncflow.tasks_live t
                 WHERE {IS_PENDING}
                   AND t.queue > w.queue
                 ORDER BY t.queue
                 LIMIT 1)
          FROM waiting w
         WHERE w.queue IS NOT NULL)
    SELECT oldest.queue, oldest.name, count(*)::int AS count,
           extract(epoch FROM now() - min(oldest.run_at))::float8 AS waiting_seconds
      FROM (SELECT queue FROM waiting WHERE queue IS NOT NULL LIMIT {QUEUES_MAX}) AS waiting
     CROSS JOIN generate_series(9, 0, -1) AS level (priority)
     CROSS JOIN LATERAL ({_OLDEST}) AS oldest
     WHERE NOT {is_paused("oldest.queue")}
       AND NOT EXISTS (SELECT FROM asyncflow.workers w
                        WHERE {HAS_NOT_ENDED}
                          AND oldest.name = ANY (w.handlers)
                          AND oldest.queue = ANY (w.queues))
     GROUP BY oldest.queue, oldest.name
     ORDER BY count DESC, oldest.queue, oldest.name
"""


async def unserved(db: Executor, *, sample: int, due_for_seconds: float) -> list[Unserved]:
    """
    Tasks that have been due for a while and that no live worker offers, most first.

    Paused queues are left out: their tasks are meant to wait.
    """
    return [Unserved(*row) for row in await db.fetch(UNSERVED, sample, due_for_seconds)]
