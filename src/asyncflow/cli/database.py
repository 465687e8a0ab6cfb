"""
Which database a command means: the one that is set, or the one `asyncflow dev` brings along.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncflow.embedded import Cluster
from asyncflow.settings import Settings, required_database_url
from asyncflow.store.database import Database
from asyncflow.store.schema import check_schema


def embedded_cluster(settings: Settings) -> Cluster:
    """
    The PostgreSQL of `asyncflow dev` in this folder, running or not.
    """
    return Cluster(settings.data_folder / "postgres")


@asynccontextmanager
async def opened(settings: Settings, *, size: int = 2) -> AsyncIterator[Database]:
    """
    The database for one command, its schema checked; `size` connections at most.

    Raises:
        InvalidSettings: None is set, and no `asyncflow dev` runs in this folder.
        SchemaMismatch: It needs a migration.
        StoreUnavailable: It cannot be reached.
    """
    async with Database(
        _url(settings),
        size=size,
        timeout_seconds=settings.database_timeout_seconds,
        pooler=settings.database_pooler,
        name="asyncflow command",
    ) as db:
        await check_schema(db)
        yield db


def _url(settings: Settings) -> str:
    cluster = embedded_cluster(settings)
    if settings.database_url is None and (cluster.folder / "data" / "postmaster.pid").exists():
        return cluster.url
    return required_database_url(settings)
