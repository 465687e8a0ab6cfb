"""
`asyncflow queue …`: pausing and resuming queues.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from asyncflow.store.database import Database

queue_argument = click.argument("name", metavar="NAME")


@click.group("queue")
def app() -> None:
    """
    Pause and resume queues.
    """


@app.command()
@queue_argument
def pause(name: str) -> None:
    """
    Start no more tasks of a queue. What runs goes on, and tasks are still accepted.
    """
    from asyncflow.store import queues

    _run(name, queues.pause)
    click.echo(f"Queue {name!r} is paused.")


@app.command()
@queue_argument
def resume(name: str) -> None:
    """
    Let tasks of a paused queue start again.
    """
    from asyncflow.store import queues

    _run(name, queues.resume)
    click.echo(f"Queue {name!r} is not paused.")


def _run(name: str, change: Callable[[Database, str], Awaitable[None]]) -> None:
    from asyncflow.domain.policy import NAME_PATTERN

    if not NAME_PATTERN.fullmatch(name):
        raise click.BadParameter(f"{name!r} is no queue: use 1 to 128 of A-Z a-z 0-9 . _ -")
    asyncio.run(_change(name, change))


async def _change(name: str, change: Callable[[Database, str], Awaitable[None]]) -> None:
    from asyncflow.cli.database import opened
    from asyncflow.settings import load_settings
    from asyncflow.store.wakeups import send_wakeup

    async with opened(load_settings()) as db:
        await change(db, name)
        await send_wakeup(db)
