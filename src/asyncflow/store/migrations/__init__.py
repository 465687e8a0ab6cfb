"""
Brings a database to the schema of this version, by Alembic.

One file per version under `versions/`, plain SQL. Safe to run by many at once: an advisory
lock lets the first one work and the others find nothing left to do.
"""

from __future__ import annotations

from pathlib import Path

import asyncpg
from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from asyncflow.errors import SchemaMismatch
from asyncflow.store.database import translated_errors
from asyncflow.store.schema import SCHEMA_VERSION, read_schema

MIGRATION_LOCK = 0x4153_594E_4346_4C57
"""Advisory lock key: the letters ASYNCFLW."""


async def migrate(url: str) -> str | None:
    """
    Bring the database to this version's schema; return the version it had before.

    All or nothing: a migration that fails leaves the schema as it was.

    Raises:
        SchemaMismatch: The database's schema is newer than this version.
        StoreUnavailable: PostgreSQL cannot be reached.
    """

    async def connect() -> asyncpg.Connection[asyncpg.Record]:
        return await asyncpg.connect(url, timeout=10, statement_cache_size=0)

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        with translated_errors():
            before = await _version(url)
            if before is not None and before > SCHEMA_VERSION:
                raise SchemaMismatch(found=before, needed=SCHEMA_VERSION)
            async with engine.begin() as connection:
                await connection.run_sync(_upgrade)
            return before
    finally:
        await engine.dispose()


async def _version(url: str) -> str | None:
    connection = await asyncpg.connect(url, timeout=10, statement_cache_size=0)
    try:
        found = await read_schema(connection)
        return found.version if found else None
    finally:
        await connection.close()


def _upgrade(connection: Connection) -> None:
    connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
    connection.execute(text("CREATE SCHEMA IF NOT EXISTS asyncflow"))
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
