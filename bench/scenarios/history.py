"""
Claim and settle with a long history: the store's functions on one connection, in batches of 100,
with no finished tasks and with millions.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from uuid import uuid4

import uvloop

from asyncflow.domain.outcome import Settlement
from asyncflow.domain.states import Event
from asyncflow.store import claims, settle, submit
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.migrations import migrate
from asyncflow.store.settle import Settling
from bench.addresses import database_url
from bench.entrants import OURS, Entrant
from bench.run import Measurement, Run
from bench.systems.asyncflow import new_task

NAME = "history"

BATCH = 100
ROUNDS = 7
OFFERS = [Offer("bench-noop", 5, 900.0)]

FILL = """
    INSERT INTO asyncflow.tasks
           (id, tenant_id, name, queue, priority, state, attempt, run_at, created_at,
            started_at, finished_at, worker_id, lease_id, payload, result)
    SELECT ('01900000-' || lpad(to_hex(n / 65536 % 65536), 4, '0') || '-7'
            || lpad(to_hex(n / 16 % 4096), 3, '0') || '-8000-' || lpad(to_hex(n), 12, '0'))::uuid,
           1, 'bench-noop', 'default', 4, 'completed', 1, moment, moment,
           moment, moment, gen_random_uuid(), gen_random_uuid(),
           '{"to": "someone@example.com", "template": "invoice"}', '{"ok": true}'
      FROM (SELECT n, now() - interval '7 days' + n * interval '10 ms' AS moment
              FROM generate_series($1::int, $2::int) AS n) AS history
"""
FILL_ROWS = 500_000
DISK_BYTES_PER_ROW = 1_000
"""Space for table, indexes and write-ahead log, with a margin."""


def measurements(run: Run) -> list[Measurement]:
    """
    An empty history and a long one, the same code on the same tables.
    """
    if not any(entrant.is_ours for entrant in run.entrants):
        return []
    ours = OURS[0]
    # A single measurement: filling the history takes longer than the rest.
    return [Measurement(ours, {}, partial(measure, run, ours), once=True)]


def measure(run: Run, entrant: Entrant) -> dict[str, Any]:
    """
    Measure the rates with an empty and with a long history, alternating.
    """
    free = shutil.disk_usage(run.services.folder).free
    if free < run.sizes.finished * DISK_BYTES_PER_ROW:
        raise RuntimeError(f"{run.sizes.finished:,} finished tasks need more than {free:,} bytes")
    run.prepare(entrant)
    count = run.tasks(40_000)
    with run.services.another_database() as another:
        rounds = uvloop.run(_measure(run, another, count))
    return {"finished": run.sizes.finished, "tasks": count, "rounds": rounds}


async def _measure(run: Run, another: str, count: int) -> dict[str, list[dict[str, float]]]:
    await migrate(another)
    # Long statements, one session each: these connections are not workers.
    async with (
        Database(database_url(), size=1, timeout_seconds=600) as empty,
        Database(another, size=1, timeout_seconds=600) as long,
    ):
        await _fill(long, run.sizes.finished)
        await long.execute("VACUUM ANALYZE")
        rates: dict[str, list[dict[str, float]]] = {"empty": [], "long": []}
        for number in range(1 + ROUNDS):
            for length, db in (("empty", empty), ("long", long)):
                if length == "empty":
                    await db.execute("TRUNCATE asyncflow.tasks")
                # Not the finished tasks: they were vacuumed, and would take longer than everything
                # else.
                await db.execute("VACUUM ANALYZE asyncflow.tasks_live")
                await db.execute("CHECKPOINT")
                measured = await _round(db, count)
                if number > 0:  # The first only warms up.
                    rates[length].append(measured)
        return rates


async def _fill(db: Database, finished: int) -> None:
    for first in range(1, finished + 1, FILL_ROWS):
        await db.execute(FILL, first, min(first + FILL_ROWS - 1, finished))


async def _round(db: Database, count: int) -> dict[str, float]:
    seconds = {"submit": 0.0, "claim": 0.0, "settle": 0.0}

    async def timed(verb: str, call: Callable[[], Awaitable[Any]]) -> Any:
        start = time.perf_counter()
        answer = await call()
        seconds[verb] += time.perf_counter() - start
        return answer

    for _ in range(count // BATCH):
        new = [new_task('{"to": "someone@example.com"}') for _ in range(BATCH)]
        await timed("submit", partial(submit.submit, db, new))
    worker_id = uuid4()
    for _ in range(count // BATCH):
        claim = partial(
            claims.claim_due,
            db,
            lease_id=uuid4(),
            worker_id=worker_id,
            offers=OFFERS,
            queues=["default"],
            limit=BATCH,
        )
        claimed = await timed("claim", claim)
        done = Settlement(Event.COMPLETE, result='{"ok": true}')
        settlings = [Settling(c.task_id, c.lease_id, done) for c in claimed]
        written = await timed("settle", partial(settle.settle, db, settlings))
        assert len(claimed) == BATCH and all(written)
    return {verb: round(count / spent, 1) for verb, spent in seconds.items()}
