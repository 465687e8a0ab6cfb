"""
Which schemas this version of AsyncFlow runs on.

A version runs on its own schema and on newer ones that still serve it, so that a deployment can
migrate first and replace the processes afterwards. The schema records the oldest version that it
serves; `migrations/` has the rules that keep this true.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from asyncflow.errors import SchemaMismatch, StoreUnavailable
from asyncflow.store.database import Executor, translated_errors
from asyncflow.store.sqlstates import MISSING

MIGRATIONS = Path(__file__).parent / "migrations" / "versions"

SCHEMA_VERSION = max(file.name[:4] for file in MIGRATIONS.glob("[0-9]*.py"))
"""The newest migration."""

# Databases that were migrated before the column existed serve their own version alone.
READ_SCHEMA = """
    SELECT version_num,
           coalesce(to_jsonb(v) ->> 'compatible_from', version_num) AS compatible_from
      FROM asyncflow.schema_version v
"""


class Schema(NamedTuple):
    """
    The schema of a database.

    Attributes:
        compatible_from: The schema version of the oldest AsyncFlow that it serves.
    """

    version: str
    compatible_from: str

    @property
    def serves_us(self) -> bool:
        """
        Whether this version of AsyncFlow runs on it.
        """
        return self.compatible_from <= SCHEMA_VERSION <= self.version


async def read_schema(db: Executor) -> Schema | None:
    """
    The database's schema; None if AsyncFlow was never migrated into it.
    """
    try:
        with translated_errors():
            row = await db.fetchrow(READ_SCHEMA)
    except StoreUnavailable as error:
        if error.sqlstate not in MISSING:
            raise
        return None
    return None if row is None else Schema(*row)


async def check_schema(db: Executor) -> Schema:
    """
    Return the database's schema if this version runs on it.

    Raises:
        SchemaMismatch: It is missing, older, or too new.
        StoreUnavailable: PostgreSQL cannot answer.
    """
    found = await read_schema(db)
    if found is None or not found.serves_us:
        raise mismatch(found)
    return found


def mismatch(found: Schema | None) -> SchemaMismatch:
    """
    The error about a schema that this version does not run on.
    """
    if found is None:
        return SchemaMismatch(found=None, needed=SCHEMA_VERSION)
    is_newer = found.version > SCHEMA_VERSION
    return SchemaMismatch(found=found.version, needed=SCHEMA_VERSION, is_newer=is_newer)
