"""
A sign of life of maintenance.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
compatible_from = "0002"

STATEMENTS = (
    """
    -- One row, written by every maintenance process every few seconds; none before the first.
    CREATE TABLE asyncflow.maintenance (
        id             boolean      PRIMARY KEY DEFAULT true CHECK (id),
        seen_at        timestamptz  NOT NULL,
        relay_trouble  text                        -- why hints cannot be sent; NULL: they can
    ) WITH (fillfactor = 50)
    """,
)


def upgrade() -> None:
    """
    Create it. What version 0002 uses stays as it was.
    """
    for statement in STATEMENTS:
        op.execute(statement)
