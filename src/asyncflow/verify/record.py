"""
The database's own record of the changes to tasks and workers.

Triggers write it in the transaction that changes the row, so it always agrees with the rows.
Entries about one task are in order, because they are numbered while its row is locked.

Recording a change costs PostgreSQL about as much as the change itself. So triggers only copy
columns, which become JSON at the end of the run. They run with the privileges of their owner; the
processes of a run have none here.
"""

from __future__ import annotations

from pathlib import Path

import asyncpg

# BEFORE triggers on tasks, because an UPDATE that moves a row to another partition fires no AFTER
# UPDATE trigger. Its deletion and insertion must not be recorded as events of their own.
INSTALL = """
    CREATE SCHEMA asyncflow_verify;

    CREATE SEQUENCE asyncflow_verify.seq;

    CREATE TABLE asyncflow_verify.transitions (
        seq               bigint NOT NULL DEFAULT nextval('asyncflow_verify.seq'),
        at                timestamptz NOT NULL DEFAULT clock_timestamp(),
        now               timestamptz NOT NULL DEFAULT now(),
        task              uuid NOT NULL,
        old               text,
        new               text NOT NULL,
        old_lease         uuid,
        lease             uuid,
        old_worker        uuid,
        worker            uuid,
        old_attempt       integer,
        attempt           integer NOT NULL,
        old_generation    integer,
        generation        integer NOT NULL,
        old_failures      integer,
        failures          integer NOT NULL,
        max_attempts      integer,
        cancel_requested  boolean,
        old_run_at        timestamptz,
        run_at            timestamptz NOT NULL,
        expires_at        timestamptz,
        result_lease      text,
        kind              text,
        message           text
    );

    CREATE TABLE asyncflow_verify.workers (
        seq               bigint NOT NULL DEFAULT nextval('asyncflow_verify.seq'),
        at                timestamptz NOT NULL DEFAULT clock_timestamp(),
        what              text NOT NULL,
        worker            uuid NOT NULL,
        name              text NOT NULL,
        silent            interval,
        lease_seconds     float8 NOT NULL,
        heartbeat_seconds float8 NOT NULL
    );

    CREATE FUNCTION asyncflow_verify.on_submit() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER AS $$
    BEGIN
        INSERT INTO asyncflow_verify.transitions
               (task, new, attempt, generation, failures, run_at, expires_at)
        VALUES (NEW.id, NEW.state, NEW.attempt, NEW.generation, NEW.failures, NEW.run_at,
                NEW.expires_at);
        RETURN NEW;
    END $$;

    CREATE FUNCTION asyncflow_verify.on_move() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER AS $$
    BEGIN
        INSERT INTO asyncflow_verify.transitions
               (task, old, new, old_lease, lease, old_worker, worker, old_attempt, attempt,
                old_generation, generation, old_failures, failures, max_attempts,
                cancel_requested, old_run_at, run_at, expires_at, result_lease, kind, message)
        VALUES (NEW.id, OLD.state, NEW.state, OLD.lease_id, NEW.lease_id, OLD.worker_id,
                NEW.worker_id, OLD.attempt, NEW.attempt, OLD.generation, NEW.generation,
                OLD.failures, NEW.failures, NEW.max_attempts, OLD.cancel_requested_at IS NOT NULL,
                OLD.run_at, NEW.run_at, NEW.expires_at, NEW.result ->> 'lease',
                NEW.failure ->> 'kind', left(NEW.failure ->> 'message', 200));
        RETURN NEW;
    END $$;

    CREATE FUNCTION asyncflow_verify.on_worker() RETURNS trigger LANGUAGE plpgsql
    SECURITY DEFINER AS $$
    BEGIN
        INSERT INTO asyncflow_verify.workers
               (what, worker, name, silent, lease_seconds, heartbeat_seconds)
        VALUES (CASE WHEN NEW.lost_at IS NOT NULL THEN 'db.lost'
                     WHEN NEW.stopped_at IS NOT NULL THEN 'db.stopped'
                     ELSE 'db.heartbeat' END,
                NEW.id, NEW.name,
                CASE WHEN TG_OP = 'UPDATE' THEN now() - OLD.heartbeat_at END,
                NEW.lease_seconds, NEW.heartbeat_seconds);
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

    CREATE FUNCTION asyncflow_verify.micros(moment timestamptz) RETURNS bigint
    LANGUAGE sql IMMUTABLE
    AS $$ SELECT (extract(epoch FROM moment) * 1000000)::bigint $$;
"""

TRANSITIONS = """
    SELECT CASE WHEN t.old IS NULL
           THEN json_build_object(
               'what', 'db.submit', 'task', t.task, 'seq', t.seq, 'new', t.new,
               'attempt', t.attempt, 'generation', t.generation,
               'at', asyncflow_verify.micros(t.at))
           ELSE row_to_json(moved) END
      FROM asyncflow_verify.transitions t
     CROSS JOIN LATERAL (
           SELECT 'db.move' AS what, task, seq, old, new, old_lease, lease, old_worker, worker,
                  old_attempt, attempt, old_generation, generation, old_failures, failures,
                  max_attempts, cancel_requested,
                  asyncflow_verify.micros(old_run_at) AS old_run_at,
                  asyncflow_verify.micros(run_at) AS run_at,
                  asyncflow_verify.micros(expires_at) AS expires_at,
                  result_lease, kind, message,
                  asyncflow_verify.micros(now) AS now,
                  asyncflow_verify.micros(at) AS at) AS moved
"""

WORKERS = """
    SELECT json_build_object(
               'what', what, 'seq', seq, 'worker', worker, 'name', name,
               'silent_micros', (extract(epoch FROM silent) * 1000000)::bigint,
               'lease_seconds', lease_seconds, 'heartbeat_seconds', heartbeat_seconds,
               'at', asyncflow_verify.micros(at))
      FROM asyncflow_verify.workers
"""

ROWS = """
    SELECT json_build_object(
               'what', 'db.row', 'task', id, 'state', state, 'attempt', attempt,
               'generation', generation, 'failures', failures, 'lease', lease_id,
               'submission', (payload ->> 'submission')::bigint,
               'result_submission', result -> 'submission', 'result_digest', result ->> 'digest',
               'result_lease', result ->> 'lease', 'result_attempt', result -> 'attempt',
               'result_blob', length(result ->> 'blob'),
               'has_result', result IS NOT NULL)
      FROM asyncflow.tasks
"""


async def install(url: str) -> None:
    """
    Start recording; needs AsyncFlow's schema.
    """
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(INSTALL)
    finally:
        await connection.close()


async def export(url: str, folder: Path) -> None:
    """
    Write the record, and every task in its final state, into `folder`.
    """
    connection = await asyncpg.connect(url)
    try:
        for name, query in (("transitions", TRANSITIONS), ("workers", WORKERS), ("rows", ROWS)):
            # JSON contains neither of these two characters unescaped, so each line is one object.
            await connection.copy_from_query(
                query,
                output=folder / f"db-{name}.jsonl",
                format="csv",
                delimiter="\x02",
                quote="\x01",
            )
    finally:
        await connection.close()


async def unfinished(url: str) -> int:
    """
    The number of tasks that are not terminal.
    """
    connection = await asyncpg.connect(url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM asyncflow.tasks_live"))
    finally:
        await connection.close()
