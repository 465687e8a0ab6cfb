"""
Which schema this version of AsyncFlow runs on, and the check every process makes first.
"""

from __future__ import annotations

from asyncflow.errors import SchemaMismatch, StoreUnavailable
from asyncflow.store.database import Executor, translated_errors
from asyncflow.store.sqlstates import MISSING

SCHEMA_VERSION = "0001"
"""The newest migration under `migrations/versions`."""

READ_VERSION = """
    SELECT version_num
      FROM asyncflow.schema_version
"""


async def schema_version(db: Executor) -> str | None:
    """
    The schema version the database has; None if AsyncFlow was never migrated into it.
    """
    try:
        with translated_errors():
            version: str | None = await db.fetchval(READ_VERSION)
    except StoreUnavailable as error:
        if error.sqlstate not in MISSING:
            raise
        return None
    return version


async def check_schema(db: Executor) -> None:
    """
    Return if the database's schema is the one this version needs.

    Raises:
        SchemaMismatch: It is missing, older or newer.
        StoreUnavailable: PostgreSQL cannot answer.
    """
    found = await schema_version(db)
    if found != SCHEMA_VERSION:
        raise SchemaMismatch(found=found, needed=SCHEMA_VERSION)
