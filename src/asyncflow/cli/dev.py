"""
`asyncflow dev`: all of AsyncFlow on this machine, under one parent.

It starts the database (the embedded PostgreSQL, or the one that an option names), migrates it,
and runs API, worker and maintenance as supervised processes. PostgreSQL stops last.

Configured servers are not used unless an option says so. The settings in a project's folder often
point to production, where this would migrate the schema and run tasks with local code. A
broker belongs to its database: hints of another installation name tasks that do not exist there.
"""

from __future__ import annotations

import asyncio
import http.client
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from asyncflow import __version__
from asyncflow.aio.background import Background
from asyncflow.cli.database import embedded_cluster
from asyncflow.errors import InvalidSettings, NoDataFolder, NotConfirmed
from asyncflow.processes.api import listen
from asyncflow.processes.supervisor import SupervisedProcess, Supervisor, as_environment
from asyncflow.settings import PREFIX, Settings, masked, required_database_url
from asyncflow.store.database import Database
from asyncflow.store.schema import SCHEMA_VERSION, read_schema
from asyncflow.urls import address

READY_POLL_SECONDS = 0.05
ROLES = ("api", "worker", "maintenance")


def chosen_servers(
    settings: Settings, *, database: str | None, broker: str | None, confirmed: bool
) -> Settings:
    """
    The settings with only the servers that options name; prints which others are ignored.

    Args:
        database, broker: The options' values; None if not given. A URL that was typed is in
            `settings` already and needs no confirmation.
        confirmed: Whether the configured database may be used without asking.

    Raises:
        NotConfirmed: The configured database needs a confirmation, and there is no terminal.
    """
    if database is None:
        _say_ignored(settings.database_url, "DATABASE_URL", "--database-url")
        settings = replace(settings, database_url=None, database_pooler=False)
    elif database != settings.database_url:
        _confirm(required_database_url(settings), confirmed=confirmed)
        # The broker of the same settings carries the hints of that database.
        broker = broker or settings.broker_url
    if broker is None:
        _say_ignored(settings.broker_url, "BROKER_URL", "--broker-url")
        settings = replace(settings, broker_url=None)
    elif settings.broker_url is None:
        raise InvalidSettings([f"--broker-url needs a URL, or {PREFIX}BROKER_URL."])
    return settings


def _say_ignored(url: str | None, variable: str, option: str) -> None:
    if url is not None:
        click.echo(
            f"{PREFIX}{variable} is set but ignored here; use it with {option}.",
            err=True,
        )


def _confirm(url: str, *, confirmed: bool) -> None:
    deed = f"migrate {masked(url)} to schema {SCHEMA_VERSION} and run its tasks here"
    if confirmed:
        return
    if not sys.stdin.isatty():
        raise NotConfirmed(deed)
    click.confirm(f"This will {deed}. Continue?", abort=True, err=True)


async def develop(settings: Settings) -> int:
    """
    Run everything until a signal; return the exit status.

    Raises:
        AddressTaken: The API's port is in use; nothing was started.
        EmbeddedDatabaseError: The embedded PostgreSQL cannot run.
        SchemaMismatch: The database's schema is newer than this version.
        StoreUnavailable: The database named by an option cannot be reached.
    """
    # Before anything starts, and before the readiness check could mistake another program on that
    # port for our API.
    listen(settings.api_host, settings.api_port).close()
    with Supervisor(grace_seconds=settings.shutdown_grace_seconds) as supervisor:
        async with _database(settings, supervisor) as url:
            await _migrate(url, settings)
            environment = as_environment(replace(settings, database_url=url))
            children = [SupervisedProcess(role, [role], environment) for role in ROLES]
            async with Background(partial(_announce, settings), name="announce"):
                return await supervisor.run(children)


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
    # A signal must not interrupt this and leave a server behind; it takes a second.
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
        found = await read_schema(db)
    if found is not None and found.serves_us:
        return
    # This import takes as long as everything else here together, and is rarely needed.
    from asyncflow.store.migrations import migrate

    await migrate(url, say=partial(click.echo, err=True))


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
    return f"{masked(settings.database_url)} (--database-url)"
