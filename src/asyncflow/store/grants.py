"""
The rights that API, workers, maintenance and the command line need, as SQL for the role that
migrates.
"""

from __future__ import annotations

GRANTS = """\
-- Run this as the role that runs `asyncflow migrate`. Safe to repeat.
GRANT USAGE ON SCHEMA asyncflow TO {role};
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA asyncflow TO {role};
REVOKE INSERT, UPDATE, DELETE ON asyncflow.schema_version FROM {role};
-- So that tables of later migrations need no grants of their own:
ALTER DEFAULT PRIVILEGES IN SCHEMA asyncflow
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {role};
"""


def grants_for(role: str) -> str:
    """
    The statements that let `role` run everything but migrations.
    """
    quoted = role.replace('"', '""')
    return GRANTS.format(role=f'"{quoted}"')
