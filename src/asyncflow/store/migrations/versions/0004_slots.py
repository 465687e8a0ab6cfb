"""
One word for the number of attempts that a worker runs at a time: its slots.

It renames a column that the versions before read and write, so it serves none of them.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
compatible_from = "0004"

STATEMENTS = (
    """
    ALTER TABLE asyncflow.workers
      RENAME COLUMN concurrency TO slots
    """,
)


def upgrade() -> None:
    """
    Rename it.
    """
    for statement in STATEMENTS:
        op.execute(statement)
