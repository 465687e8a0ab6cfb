"""
Which installation of AsyncFlow this is, for what it shares with others: RabbitMQ.

The database tells. Its server's identifier is given at `initdb` and its own number when it is
created, so a dump that is restored elsewhere, as staging is from production, is another
installation, and a standby that takes over is the same. A copy of the server's files is not told
from its original.
"""

from __future__ import annotations

from asyncflow.store.database import Executor

MAY_ASK = """
    SELECT has_function_privilege('pg_control_system()', 'EXECUTE')
"""

IDENTITY = """
    SELECT left(current_database(), 64) || ' '
           || to_hex(c.system_identifier) || '-' || to_hex(d.oid::bigint)
      FROM pg_control_system() c,
           pg_database d
     WHERE d.datname = current_database()
"""


async def identity(db: Executor) -> str | None:
    """
    A name for this installation, with the database's for people; None if PostgreSQL does not let us
    ask.
    """
    if not await db.fetchval(MAY_ASK):
        return None
    name: str = await db.fetchval(IDENTITY)
    return name
