"""
The backoffs that the handlers of a worker declare, so that the reaper retries by the same policy.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
compatible_from = "0004"

STATEMENTS = (
    # By name, of the handlers with a backoff other than the default; NULL if there is none.
    """
    ALTER TABLE asyncflow.workers
      ADD COLUMN backoffs json
    """,
)


def upgrade() -> None:
    """
    Add the column. Workers of earlier versions leave it NULL.
    """
    for statement in STATEMENTS:
        op.execute(statement)
