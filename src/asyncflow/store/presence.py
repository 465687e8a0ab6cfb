"""
Signs of life from maintenance. Without it tasks of dead workers wait and, with RabbitMQ, no task
starts.
"""

from __future__ import annotations

from typing import NamedTuple

from asyncflow.store.database import Executor

SILENT_SECONDS_MAX = 30.0
"""Longer than a restart. Maintenance that has been silent for longer is considered gone."""


class Presence(NamedTuple):
    """
    What is known of maintenance.

    Attributes:
        silent_seconds: How long ago it was last seen; None if it never was.
        relay_trouble: Why it could not send hints then; None if it could, or need not.
    """

    silent_seconds: float | None
    relay_trouble: str | None

    @property
    def is_gone(self) -> bool:
        """
        Whether no maintenance process is running.
        """
        return self.silent_seconds is None or self.silent_seconds > SILENT_SECONDS_MAX


SIGN = """
    INSERT INTO asyncflow.maintenance (seen_at, relay_trouble)
    VALUES (now(), $1)
        ON CONFLICT (id) DO UPDATE
       SET seen_at = excluded.seen_at,
           relay_trouble = excluded.relay_trouble
"""


async def sign(db: Executor, *, relay_trouble: str | None) -> None:
    """
    Record that maintenance is running.
    """
    await db.execute(SIGN, relay_trouble)


PRESENCE = """
    SELECT extract(epoch FROM now() - seen_at)::float8 AS silent_seconds,
           relay_trouble
      FROM asyncflow.maintenance
"""


async def presence(db: Executor) -> Presence:
    """
    When maintenance was last seen, and what it reported.
    """
    row = await db.fetchrow(PRESENCE)
    return Presence(None, None) if row is None else Presence(*row)
