"""
Measures candidate layouts of the `tasks` table: submit, claim and settle rates with no
history and with millions of finished tasks. The result is recorded in
docs/internals/decisions.md ("How are tasks stored?").

    python bench/table_layout.py DSN [--finished 2000000] [--tasks 20000] [--payload-bytes 200]

One connection, batches of 100, each with its own fsynced commit. The layouts take turns, so that a
drift in the machine's speed affects all of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
import uuid
from typing import Any

import asyncpg

BATCH = 100

# As in asyncflow.store.database. Without these, a statement planned while the table is nearly empty
# keeps its sequential scan forever: claims fell from 75,000 to 1,500 per second.
PLANNER = {
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
}

COLUMNS = """
    id uuid NOT NULL, tenant_id integer NOT NULL, name text NOT NULL, queue text NOT NULL,
    priority smallint NOT NULL, state text NOT NULL, run_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(), queued_at timestamptz,
    started_at timestamptz, finished_at timestamptz,
    lease_id uuid, worker_id uuid, attempt integer NOT NULL DEFAULT 0,
    failures integer NOT NULL DEFAULT 0, payload {json}, result {json}
"""
LIVE_INDEXES = """
    CREATE INDEX {t}_due ON {t} (queue, priority, run_at, id)
        WHERE lease_id IS NULL AND queued_at IS NULL;
    CREATE INDEX {t}_running ON {t} (worker_id) WHERE worker_id IS NOT NULL AND finished_at IS NULL;
"""
HISTORY_INDEXES = """
    CREATE INDEX {t}_by_name ON {t} (tenant_id, name, id);
    CREATE INDEX {t}_finished_at ON {t} (finished_at);
"""


def one_table(json_type: str) -> str:
    columns = COLUMNS.format(json=json_type)
    return f"""
        CREATE TABLE tasks ({columns}, PRIMARY KEY (id));
        {LIVE_INDEXES.format(t="tasks")}
        CREATE INDEX tasks_by_name ON tasks (tenant_id, name, id);
        CREATE INDEX tasks_finished_at ON tasks (finished_at) WHERE finished_at IS NOT NULL;
    """


def partitioned(json_type: str) -> str:
    columns = COLUMNS.format(json=json_type)
    return f"""
        CREATE TABLE tasks ({columns}, PRIMARY KEY (id, state)) PARTITION BY LIST (state);
        CREATE TABLE tasks_live PARTITION OF tasks
            FOR VALUES IN ('pending', 'queued', 'running');
        CREATE TABLE tasks_finished PARTITION OF tasks
            FOR VALUES IN ('completed', 'failed', 'cancelled');
        {LIVE_INDEXES.format(t="tasks_live")}
        {HISTORY_INDEXES.format(t="tasks_finished")}
    """


def moved(json_type: str) -> str:
    columns = COLUMNS.format(json=json_type)
    return f"""
        CREATE TABLE tasks ({columns}, PRIMARY KEY (id));
        CREATE TABLE finished ({columns}, PRIMARY KEY (id));
        {LIVE_INDEXES.format(t="tasks")}
        {HISTORY_INDEXES.format(t="finished")}
    """


def side_payload(json_type: str) -> str:
    return (
        one_table(json_type).replace(f"payload {json_type},", "")
        + f"CREATE TABLE payloads (id uuid PRIMARY KEY, payload {json_type});"
    )


INSERT = """
    INSERT INTO tasks (id, tenant_id, name, queue, priority, state, run_at, payload)
    SELECT id, 1, 'name', 'default', 4, 'pending', now(), payload
      FROM unnest($1::uuid[], $2::{json}[]) AS u (id, payload)
"""
INSERT_SIDE = """
    WITH p AS (
        INSERT INTO payloads SELECT * FROM unnest($1::uuid[], $2::{json}[]) RETURNING id)
    INSERT INTO tasks (id, tenant_id, name, queue, priority, state, run_at)
    SELECT id, 1, 'name', 'default', 4, 'pending', now() FROM p
"""
CLAIM = """
    WITH due AS (
        SELECT id FROM tasks
         WHERE state = 'pending' AND lease_id IS NULL AND queued_at IS NULL
           AND queue = 'default' AND priority = 4 AND run_at <= now()
         ORDER BY run_at, id LIMIT $1 FOR UPDATE SKIP LOCKED)
    UPDATE tasks t
       SET state = 'running', lease_id = $2, worker_id = $3, started_at = now(),
           attempt = attempt + 1
      FROM due WHERE t.id = due.id AND t.state = 'pending'
    RETURNING t.id, t.name, {payload}
"""
SETTLE = """
    UPDATE tasks t
       SET state = 'completed', result = u.result, finished_at = now()
      FROM unnest($1::uuid[], $3::{json}[]) AS u (id, result)
     WHERE t.id = u.id AND t.state = 'running' AND t.lease_id = $2
"""
SETTLE_MOVED = """
    WITH gone AS (
        DELETE FROM tasks t USING unnest($1::uuid[], $3::{json}[]) AS u (id, result)
         WHERE t.id = u.id AND t.state = 'running' AND t.lease_id = $2
        RETURNING t.*, u.result AS new_result)
    INSERT INTO finished (id, tenant_id, name, queue, priority, state, run_at, created_at,
        started_at, finished_at, lease_id, worker_id, attempt, failures, payload, result)
    SELECT id, tenant_id, name, queue, priority, 'completed', run_at, created_at, started_at,
        now(), lease_id, worker_id, attempt, failures, payload, new_result FROM gone
"""

LAYOUTS = {
    "one table, jsonb": (one_table, "jsonb", INSERT, SETTLE, "t.payload"),
    "one table, json": (one_table, "json", INSERT, SETTLE, "t.payload"),
    "two partitions, json": (partitioned, "json", INSERT, SETTLE, "t.payload"),
    "two tables, json": (moved, "json", INSERT, SETTLE_MOVED, "t.payload"),
    "payload beside, json": (
        side_payload,
        "json",
        INSERT_SIDE,
        SETTLE,
        "(SELECT payload FROM payloads p WHERE p.id = t.id)",
    ),
}


def uuid7(step: int) -> uuid.UUID:
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | (7 << 76) | ((step & 0xFFF) << 64) | (2 << 62)
    return uuid.UUID(int=value | int.from_bytes(os.urandom(8), "big") >> 2)


async def fill_history(
    c: asyncpg.Connection, table: str, json_type: str, side: bool, n: int
) -> None:
    payload = "" if side else ", payload"
    value = "" if side else """, '{"to": "someone@example.com", "template": "invoice"}'"""
    await c.execute(f"""
        INSERT INTO {table} (id, tenant_id, name, queue, priority, state, run_at, started_at,
            finished_at, lease_id, worker_id, attempt, result{payload})
        SELECT ('01900000-' || lpad(to_hex(i / 65536 % 65536), 4, '0') || '-7'
                || lpad(to_hex(i / 16 % 4096), 3, '0') || '-8000-'
                || lpad(to_hex(i), 12, '0'))::uuid,
               1, 'name', 'default', 4, 'completed', now() - interval '1 day', now(),
               now() - interval '1 day' + i * interval '10 ms', gen_random_uuid(),
               gen_random_uuid(), 1, '{{"ok": true}}'{value}
          FROM generate_series(1, {n}) i""")


async def rates(
    c: asyncpg.Connection, layout: tuple[Any, ...], n: int, payload_bytes: int
) -> dict[str, float]:
    _, json_type, insert, settle, payload_column = layout
    payload = json.dumps({"data": "x" * max(0, payload_bytes - 12)})
    insert = await c.prepare(insert.format(json=json_type))
    claim = await c.prepare(CLAIM.format(payload=payload_column))
    settle = await c.prepare(settle.format(json=json_type))
    seconds = {"submit": 0.0, "claim": 0.0, "settle": 0.0}
    for _ in range(n // BATCH):
        ids = [uuid7(i) for i in range(BATCH)]
        start = time.perf_counter()
        await insert.fetch(ids, [payload] * BATCH)
        seconds["submit"] += time.perf_counter() - start
    claimed: list[tuple[uuid.UUID, list[uuid.UUID]]] = []
    worker = uuid.uuid4()
    for _ in range(n // BATCH):
        lease = uuid.uuid4()
        start = time.perf_counter()
        rows = await claim.fetch(BATCH, lease, worker)
        seconds["claim"] += time.perf_counter() - start
        claimed.append((lease, [r["id"] for r in rows]))
        if len(claimed) < 5:
            continue
        lease, ids = claimed.pop(0)
        start = time.perf_counter()
        await settle.fetch(ids, lease, ['{"ok": true}'] * len(ids))
        seconds["settle"] += time.perf_counter() - start
    for lease, ids in claimed:
        await settle.fetch(ids, lease, ['{"ok": true}'] * len(ids))
    return {verb: n / s for verb, s in seconds.items()}


async def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("dsn")
    arguments.add_argument("--finished", type=int, default=2_000_000)
    arguments.add_argument("--tasks", type=int, default=20_000)
    arguments.add_argument("--payload-bytes", type=int, default=200)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    admin = await asyncpg.connect(options.dsn)
    connections = {}
    for number, (title, layout) in enumerate(LAYOUTS.items()):
        name = f"layout_{number}"
        await admin.execute(f"DROP DATABASE IF EXISTS {name}")
        await admin.execute(f"CREATE DATABASE {name}")
        c = await asyncpg.connect(options.dsn, database=name, server_settings=PLANNER)
        await c.execute(layout[0](layout[1]))
        connections[title] = c
    for finished in (0, options.finished):
        if finished:
            for title, c in connections.items():
                table = "finished" if title.startswith("two tables") else "tasks"
                side = title.startswith("payload beside")
                await fill_history(c, table, LAYOUTS[title][1], side, finished)
                await c.execute("VACUUM ANALYZE")
            await admin.execute("CHECKPOINT")
        results: dict[str, list[dict[str, float]]] = {title: [] for title in LAYOUTS}
        for _ in range(options.rounds):
            for title, c in connections.items():
                results[title].append(
                    await rates(c, LAYOUTS[title], options.tasks, options.payload_bytes)
                )
        for title, runs in results.items():
            medians = {v: round(statistics.median(r[v] for r in runs)) for v in runs[0]}
            print(json.dumps({"layout": title, "finished": finished, **medians}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
