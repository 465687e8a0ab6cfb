"""
The identity of this installation of AsyncFlow, for a RabbitMQ that it shares with others.

It comes from the database: the server's identifier, given at `initdb`, and the number of the
database. So a dump that is restored elsewhere, as staging is from production, is another
installation, and a standby that takes over is the same one. A copy of the server's files cannot be
told from its original.
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
    The name of this installation, readable by the database's name in it; None if our role may not
    ask.
    """
    if not await db.fetchval(MAY_ASK):
        return None
    name: str = await db.fetchval(IDENTITY)
    return name
