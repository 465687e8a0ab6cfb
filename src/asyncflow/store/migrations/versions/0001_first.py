"""
The first schema.

Everything lives in the PostgreSQL schema `asyncflow`, so that it can share a database.
"""

from alembic import op

revision = "0001"
down_revision = None
compatible_from = "0001"

TABLES = """
CREATE TABLE asyncflow.tenants (
    id          integer     PRIMARY KEY,
    name        text        NOT NULL UNIQUE,
    created_at  timestamptz NOT NULL DEFAULT now()
);

INSERT INTO asyncflow.tenants (id, name) VALUES (1, 'default');

-- One row per task. It is partitioned by state, so that what still moves (tasks_live) stays
-- small however many tasks have finished (tasks_finished): an UPDATE to a terminal state
-- carries the row over. docs/internals/decisions.md has the measurements.
--
-- The row is also the record of its latest attempt; earlier ones are in `attempts`.
-- There is no foreign key on tenant_id: it would cost a look-up per submitted task.
CREATE TABLE asyncflow.tasks (
    id                   uuid        NOT NULL,     -- UUIDv7, so ids sort by submission
    tenant_id            integer     NOT NULL,
    name                 text        NOT NULL,     -- which handler
    queue                text        NOT NULL,
    priority             smallint    NOT NULL CHECK (priority BETWEEN 0 AND 9),
    state                text        NOT NULL DEFAULT 'pending',
    generation           integer     NOT NULL DEFAULT 1,   -- + 1 per redrive
    attempt              integer     NOT NULL DEFAULT 0,   -- claims, over all generations
    failures             integer     NOT NULL DEFAULT 0,   -- punished attempts, this generation
    max_attempts         integer     CHECK (max_attempts >= 1),    -- NULL: as the handler says
    timeout_seconds      float8      CHECK (timeout_seconds > 0),  -- NULL: as the handler says
    created_at           timestamptz NOT NULL DEFAULT now(),
    run_at               timestamptz NOT NULL,     -- never starts before
    expires_at           timestamptz,              -- never starts after
    queued_at            timestamptz,
    started_at           timestamptz,              -- the latest attempt's claim
    finished_at          timestamptz,
    cancel_requested_at  timestamptz,
    worker_id            uuid,
    lease_id             uuid,                     -- fences every write of the attempt
    failure              json,
    progress             json,
    result               json,
    payload              json        NOT NULL,
    PRIMARY KEY (id, state),
    CONSTRAINT running_has_a_lease CHECK
        (state <> 'running' OR (lease_id IS NOT NULL AND worker_id IS NOT NULL)),
    CONSTRAINT waiting_has_no_lease CHECK
        (state NOT IN ('pending', 'queued') OR (lease_id IS NULL AND worker_id IS NULL)),
    CONSTRAINT only_pending_is_not_queued CHECK
        (state NOT IN ('pending', 'queued') OR (state = 'queued') = (queued_at IS NOT NULL)),
    CONSTRAINT finished_has_a_time CHECK
        ((state IN ('completed', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
) PARTITION BY LIST (state);

CREATE TABLE asyncflow.tasks_live PARTITION OF asyncflow.tasks
    FOR VALUES IN ('pending', 'queued', 'running')
    WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000,
          autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_limit = 2000);

CREATE TABLE asyncflow.tasks_finished PARTITION OF asyncflow.tasks
    FOR VALUES IN ('completed', 'failed', 'cancelled');

-- The predicates of these indexes avoid the column `state` on purpose. Statements that go
-- by id also guard the state, and the planner, thinking that hardly any task is pending,
-- would read a whole `WHERE state = 'pending'` index instead of looking up the id.
--
-- Claims without a broker, and the relay: pending tasks of a queue, by priority.
CREATE INDEX tasks_due ON asyncflow.tasks_live (queue, priority, run_at, id)
    WHERE queued_at IS NULL AND lease_id IS NULL;
-- Queued tasks, whose hint may be lost.
CREATE INDEX tasks_queued ON asyncflow.tasks_live (queue, queued_at)
    WHERE queued_at IS NOT NULL AND lease_id IS NULL;
-- What a worker holds: heartbeats, the reaper.
CREATE INDEX tasks_running ON asyncflow.tasks_live (worker_id)
    WHERE worker_id IS NOT NULL;
CREATE INDEX tasks_expiring ON asyncflow.tasks_live (expires_at)
    WHERE expires_at IS NOT NULL AND lease_id IS NULL;

-- Lists by name, newest first; dead letters; the pruner. The first one's predicate, always
-- true, keeps statements that go by id away from it: they would read all of it.
CREATE INDEX tasks_finished_by_name ON asyncflow.tasks_finished (tenant_id, name, id)
    WHERE name IS NOT NULL;
CREATE INDEX tasks_dead ON asyncflow.tasks_finished (tenant_id, id)
    WHERE state IN ('failed', 'cancelled');
CREATE INDEX tasks_finished_at ON asyncflow.tasks_finished (finished_at);

-- Attempts that were not their task's last: written when a task leaves `running` for
-- `pending`, or is redriven.
CREATE TABLE asyncflow.attempts (
    task_id      uuid        NOT NULL,
    attempt      integer     NOT NULL,
    tenant_id    integer     NOT NULL,
    generation   integer     NOT NULL,
    outcome      text        NOT NULL
        CHECK (outcome IN ('retried', 'released', 'failed', 'cancelled')),
    started_at   timestamptz NOT NULL,
    finished_at  timestamptz NOT NULL,
    worker_id    uuid,
    lease_id     uuid,
    failure      json,
    PRIMARY KEY (task_id, attempt)
);

-- One row per worker process, a fresh id per start. Alive: neither stopped nor lost.
CREATE TABLE asyncflow.workers (
    id                 uuid        PRIMARY KEY,
    name               text        NOT NULL,       -- host and pid, for people only
    queues             text[]      NOT NULL,
    handlers           text[]      NOT NULL,
    concurrency        integer     NOT NULL,
    lock_key           bigint,                     -- session advisory lock; free means dead
    heartbeat_seconds  float8      NOT NULL,
    lease_seconds      float8      NOT NULL,
    started_at         timestamptz NOT NULL DEFAULT now(),
    heartbeat_at       timestamptz NOT NULL DEFAULT now(),
    stopped_at         timestamptz,                -- it said goodbye
    lost_at            timestamptz                 -- the reaper gave it up
) WITH (fillfactor = 50);

-- What workers published about their handlers; the newest registration of a name counts.
CREATE TABLE asyncflow.handlers (
    name            text        PRIMARY KEY,
    queue           text        NOT NULL,
    payload_schema  json        NOT NULL,
    updated_at      timestamptz NOT NULL DEFAULT now()
);

-- Queues that were ever paused.
CREATE TABLE asyncflow.queues (
    name       text        PRIMARY KEY,
    paused_at  timestamptz
);

-- One row that readiness probes write to.
CREATE TABLE asyncflow.probe (
    id          boolean     PRIMARY KEY DEFAULT true CHECK (id),
    written_at  timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

INSERT INTO asyncflow.probe DEFAULT VALUES;
"""


def upgrade() -> None:
    """
    Create everything.
    """
    without_comments = "\n".join(line.partition("--")[0] for line in TABLES.splitlines())
    for statement in without_comments.split(";"):
        if statement.strip():
            op.execute(statement)
