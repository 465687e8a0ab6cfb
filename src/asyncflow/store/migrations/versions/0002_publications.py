"""
One row per handler and the queue that it asks for, so that two services may declare one name.

It only adds: processes of the version before run on it. They keep to `handlers`, which a later
version may drop.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
compatible_from = "0001"

STATEMENTS = (
    """
    CREATE TABLE asyncflow.publications (
        name            text        NOT NULL,
        queue           text        NOT NULL,
        payload_schema  json        NOT NULL,
        published_at    timestamptz NOT NULL DEFAULT now(),   -- for the first time
        updated_at      timestamptz NOT NULL DEFAULT now(),   -- by the latest worker to start
        PRIMARY KEY (name, queue)
    )
    """,
    """
    INSERT INTO asyncflow.publications (name, queue, payload_schema, published_at, updated_at)
    SELECT name, queue, payload_schema, updated_at, updated_at
      FROM asyncflow.handlers
    """,
    # The queue that each of `handlers` asks for, in the same order.
    """
    ALTER TABLE asyncflow.workers
      ADD COLUMN handler_queues text[] NOT NULL DEFAULT '{}'
    """,
)


def upgrade() -> None:
    """
    Add them.
    """
    for statement in STATEMENTS:
        op.execute(statement)
