"""
The database's own record of what happened to tasks and workers.

Triggers write it in the transaction that changes the row, so it cannot tell another story than
the rows do. Lines of one task are in order: their numbers are drawn while its row is locked.
"""

from __future__ import annotations

import json
from pathlib import Path

import asyncpg

# BEFORE triggers on tasks, because an UPDATE that carries a row to another partition fires no AFTER
# UPDATE. The deletion and insertion it then consists of must not be taken for news.
INSTALL = """
    CREATE SCHEMA asyncflow_verify;

    CREATE TABLE asyncflow_verify.transitions (
        seq     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        fields  jsonb NOT NULL
    );

    CREATE FUNCTION asyncflow_verify.micros(moment timestamptz) RETURNS bigint
    LANGUAGE sql IMMUTABLE
    AS $$ SELECT (extract(epoch FROM moment) * 1000000)::bigint $$;

    CREATE FUNCTION asyncflow_verify.on_submit() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO asyncflow_verify.transitions (fields) VALUES (jsonb_build_object(
            'what', 'db.submit', 'task', NEW.id, 'new', NEW.state, 'attempt', NEW.attempt,
            'generation', NEW.generation, 'failures', NEW.failures,
            'at', asyncflow_verify.micros(clock_timestamp()), 'txid', txid_current()));
        RETURN NEW;
    END $$;

    CREATE FUNCTION asyncflow_verify.on_move() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO asyncflow_verify.transitions (fields) VALUES (jsonb_build_object(
            'what', 'db.move', 'task', NEW.id, 'old', OLD.state, 'new', NEW.state,
            'old_lease', OLD.lease_id, 'lease', NEW.lease_id,
            'old_worker', OLD.worker_id, 'worker', NEW.worker_id,
            'old_attempt', OLD.attempt, 'attempt', NEW.attempt,
            'old_generation', OLD.generation, 'generation', NEW.generation,
            'old_failures', OLD.failures, 'failures', NEW.failures,
            'max_attempts', NEW.max_attempts,
            'cancel_requested', OLD.cancel_requested_at IS NOT NULL,
            'old_run_at', asyncflow_verify.micros(OLD.run_at),
            'run_at', asyncflow_verify.micros(NEW.run_at),
            'expires_at', asyncflow_verify.micros(NEW.expires_at),
            'result_lease', NEW.result ->> 'lease',
            'kind', NEW.failure ->> 'kind',
            'message', left(NEW.failure ->> 'message', 200))
            || jsonb_build_object(
            'at', asyncflow_verify.micros(clock_timestamp()),
            'now', asyncflow_verify.micros(now()), 'txid', txid_current()));
        RETURN NEW;
    END $$;

    CREATE FUNCTION asyncflow_verify.on_worker() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO asyncflow_verify.transitions (fields) VALUES (jsonb_build_object(
            'what', CASE WHEN NEW.lost_at IS NOT NULL THEN 'db.lost'
                         WHEN NEW.stopped_at IS NOT NULL THEN 'db.stopped'
                         ELSE 'db.heartbeat' END,
            'worker', NEW.id, 'name', NEW.name,
            'silent_micros', CASE WHEN TG_OP = 'UPDATE' THEN
                asyncflow_verify.micros(now()) - asyncflow_verify.micros(OLD.heartbeat_at) END,
            'lease_seconds', NEW.lease_seconds, 'heartbeat_seconds', NEW.heartbeat_seconds,
            'at', asyncflow_verify.micros(clock_timestamp()), 'txid', txid_current()));
        RETURN NEW;
    END $$;

    CREATE TRIGGER verify_submit BEFORE INSERT ON asyncflow.tasks FOR EACH ROW
       WHEN (NEW.state = 'pending' AND NEW.generation = 1)
    EXECUTE FUNCTION asyncflow_verify.on_submit();

    CREATE TRIGGER verify_move BEFORE UPDATE ON asyncflow.tasks FOR EACH ROW
       WHEN (OLD.state IS DISTINCT FROM NEW.state
             OR OLD.lease_id IS DISTINCT FROM NEW.lease_id
             OR OLD.attempt <> NEW.attempt
             OR OLD.generation <> NEW.generation
             OR OLD.failures <> NEW.failures
             OR OLD.cancel_requested_at IS DISTINCT FROM NEW.cancel_requested_at)
    EXECUTE FUNCTION asyncflow_verify.on_move();

    -- AFTER, because a worker that registers again conflicts with its row, and only seems
    -- to insert one.
    CREATE TRIGGER verify_worker AFTER INSERT OR UPDATE ON asyncflow.workers FOR EACH ROW
    EXECUTE FUNCTION asyncflow_verify.on_worker();
"""

TRANSITIONS = """
    SELECT (fields || jsonb_build_object('seq', seq))::text
      FROM asyncflow_verify.transitions
     ORDER BY seq
"""

ROWS = """
    SELECT json_build_object(
               'what', 'db.row', 'task', id, 'state', state, 'attempt', attempt,
               'generation', generation, 'failures', failures, 'lease', lease_id,
               'submission', (payload ->> 'submission')::bigint,
               'result_submission', result -> 'submission', 'result_digest', result ->> 'digest',
               'result_lease', result ->> 'lease', 'result_attempt', result -> 'attempt',
               'result_blob', length(result ->> 'blob'),
               'has_result', result IS NOT NULL)::text
      FROM asyncflow.tasks
     ORDER BY id
"""


async def install(url: str) -> None:
    """
    Begin to record; AsyncFlow's schema must be there.
    """
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(INSTALL)
    finally:
        await connection.close()


async def export(url: str, folder: Path) -> None:
    """
    Write what was recorded, and every task as it is now, into `folder`.
    """
    connection = await asyncpg.connect(url)
    try:
        for file, query in (("db-transitions", TRANSITIONS), ("db-rows", ROWS)):
            with (folder / f"{file}.jsonl").open("w") as lines:
                async with connection.transaction():
                    async for row in connection.cursor(query, prefetch=1_000):
                        lines.write(json.dumps(json.loads(row[0])) + "\n")
    finally:
        await connection.close()


async def unfinished(url: str) -> int:
    """
    How many tasks are not terminal yet.
    """
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM asyncflow.tasks_live"))
    finally:
        await connection.close()
