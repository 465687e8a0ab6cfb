"""
`asyncflow doctor`: checks whether the servers are set up for AsyncFlow.

Each server has a function in `INSPECTIONS` that returns its findings; to add a server, add one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import click

from asyncflow.errors import ExitStatus

if TYPE_CHECKING:
    from asyncflow.findings import Finding
    from asyncflow.settings import Settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per check.")
def doctor(as_json: bool) -> None:
    """
    Check PostgreSQL, RabbitMQ and maintenance, and say how to fix what is wrong.

    Changes nothing. The exit status is 2 if something is wrong.
    """
    from asyncflow.settings import load_settings

    sys.exit(asyncio.run(_report(load_settings(), as_json=as_json)))


async def _report(settings: Settings, *, as_json: bool) -> int:
    is_well = True
    async for findings in _examined(settings):
        for finding in findings:
            is_well = is_well and not finding.is_wrong
            click.echo(_as_json(finding) if as_json else _as_text(finding))
    return 0 if is_well else ExitStatus.REFUSED


async def _examined(settings: Settings) -> AsyncIterator[Sequence[Finding]]:
    for inspect in INSPECTIONS:
        yield await inspect(settings)


async def _postgresql(settings: Settings) -> Sequence[Finding]:
    from asyncflow.cli.database import database_url
    from asyncflow.processes.process import OTHER_CONNECTIONS
    from asyncflow.store.database import Database
    from asyncflow.store.inspection import inspect

    async with Database(
        database_url(settings),
        size=2,
        timeout_seconds=settings.database_timeout_seconds,
        pooler=settings.database_pooler,
        name="asyncflow doctor",
    ) as db:
        return await inspect(
            db,
            timeout_seconds=settings.database_timeout_seconds,
            connections=settings.database_pool_size + OTHER_CONNECTIONS,
        )


async def _rabbitmq(settings: Settings) -> Sequence[Finding]:
    if settings.broker_url is None:
        return []
    from asyncflow.cli.database import opened
    from asyncflow.store import hints
    from asyncflow.store.installation import identity
    from asyncflow.transport.rabbitmq.inspection import inspect

    queues: Sequence[str] = ()
    installation = None
    # Problems with PostgreSQL have been reported.
    with contextlib.suppress(Exception):
        async with opened(settings) as db:
            installation = await identity(db)
            queues = [queue.name for queue in await hints.open_queues(db)]
    return await inspect(
        settings.broker_url,
        installation=installation,
        queues=queues,
        prefix=settings.broker_prefix,
    )


async def _maintenance(settings: Settings) -> Sequence[Finding]:
    from asyncflow.cli.database import opened
    from asyncflow.findings import doubtful, fine, wrong
    from asyncflow.store.presence import presence

    what = "AsyncFlow maintenance"
    try:
        async with opened(settings) as db:
            found = await presence(db)
    except Exception:
        return []  # Problems with PostgreSQL have been reported.
    if found.is_gone:
        remedy = "Start `asyncflow maintenance`."
        return [doubtful(what, "No maintenance process is running.", remedy)]
    if found.relay_trouble is not None:
        return [wrong(what, "The relay cannot send tasks through RabbitMQ.", found.relay_trouble)]
    return [fine(what, "It is running.")]


INSPECTIONS = [_postgresql, _rabbitmq, _maintenance]


def _as_text(finding: Finding) -> str:
    line = f"{finding.verdict.value:8}  {finding.what}: {finding.sentence}"
    return f"{line}\n          {finding.remedy}" if finding.remedy else line


def _as_json(finding: Finding) -> str:
    return json.dumps(
        {
            "what": finding.what,
            "verdict": finding.verdict.value,
            "sentence": finding.sentence,
            "remedy": finding.remedy or None,
        }
    )
