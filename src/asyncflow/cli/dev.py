"""
`asyncflow dev`: all of AsyncFlow on this machine, under one parent.

First a database: the embedded PostgreSQL, or the one that is set. Then its schema, then API,
worker and maintenance as supervised processes. PostgreSQL stops last.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from asyncflow import __version__
from asyncflow.cli.database import embedded_cluster
from asyncflow.errors import EmbeddedDatabaseError
from asyncflow.processes import listen
from asyncflow.settings import Settings, address, masked
from asyncflow.store.database import Database
from asyncflow.store.schema import SCHEMA_VERSION, schema_version
from asyncflow.supervisor import Child, Supervisor, as_environment

READY_POLL_SECONDS = 0.05
ROLES = ("api", "worker", "maintenance")


class NoDataFolder(EmbeddedDatabaseError):
    """
    The folder for data cannot be made or written to.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"The data folder {folder} cannot be used: {reason}; "
            "choose another one with ASYNCFLOW_DATA_FOLDER."
        )


async def develop(settings: Settings) -> int:
    """
    Run everything until a signal; return the exit status.

    Raises:
        AddressTaken: The API's port is in use; nothing was started.
        EmbeddedDatabaseError: The embedded PostgreSQL cannot run.
        SchemaMismatch: The database's schema is newer than this version.
        StoreUnavailable: The database that is set cannot be reached.
    """
    # Before anything is started, and before another program on that port could be taken
    # for our API.
    listen(settings.api_host, settings.api_port).close()
    with Supervisor(grace_seconds=settings.shutdown_grace_seconds) as supervisor:
        async with _database(settings, supervisor) as url:
            await _migrate(url, settings)
            environment = as_environment(replace(settings, database_url=url))
            children = [Child(role, [role], environment) for role in ROLES]
            announcing = asyncio.create_task(_announce(settings))
            try:
                return await supervisor.run(children)
            finally:
                announcing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await announcing


@asynccontextmanager
async def _database(settings: Settings, supervisor: Supervisor) -> AsyncIterator[str]:
    if settings.database_url is not None:
        yield settings.database_url
        return
    _prepare(settings.data_folder)
    cluster = embedded_cluster(settings)
    if not cluster.folder.exists():
        Console().print(
            f"Setting up PostgreSQL in {cluster.folder} …", style="dim", highlight=False
        )
    # Not interrupted by a signal, which must not leave a server behind; it takes a second.
    await asyncio.to_thread(cluster.start)
    try:
        yield cluster.url
    finally:
        await asyncio.to_thread(cluster.stop)


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ignore = folder / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n")
    except OSError as error:
        raise NoDataFolder(folder, error.strerror or str(error)) from error


async def _migrate(url: str, settings: Settings) -> None:
    async with Database(url, size=2, pooler=settings.database_pooler) as db:
        if await schema_version(db) == SCHEMA_VERSION:
            return
    # Costs as much time as everything else here together, and is rarely needed.
    from asyncflow.store.migrations import migrate

    await migrate(url)


async def _announce(settings: Settings) -> None:
    while True:
        if await asyncio.to_thread(_is_ready, settings.api_host, settings.api_port):
            return _print_banner(settings)
        await asyncio.sleep(READY_POLL_SECONDS)


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)


def _print_banner(settings: Settings) -> None:
    url = f"http://{address(_reachable(settings.api_host), settings.api_port)}"
    submit = f"{url}/tasks -H 'Content-Type: application/json' -d '{{\"name\": \"sample-task\"}}'"
    facts = {
        "API": url,
        "Docs": f"{url}/docs",
        "Data": _where_data_lives(settings),
        "Broker": masked(settings.broker_url) if settings.broker_url else None,
        "Try it": f"curl -X POST {submit}",
        "Stop": "Ctrl-C",
    }
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nAsyncFlow {__version__} is running.\n", style="bold")
    for label, fact in facts.items():
        if fact is not None:
            console.print(Text.assemble((f"{label:8}", "dim"), fact))
    console.print()


def _where_data_lives(settings: Settings) -> str:
    if settings.database_url is None:
        return f"{embedded_cluster(settings).folder} (embedded PostgreSQL)"
    return f"{masked(settings.database_url)} (ASYNCFLOW_DATABASE_URL)"
