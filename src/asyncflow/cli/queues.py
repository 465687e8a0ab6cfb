"""
`asyncflow queue …`: list, pause and resume queues.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click

from asyncflow.cli.tasks import json_option, run_with_database

if TYPE_CHECKING:
    from asyncflow.store.database import Database

queue_argument = click.argument("name", metavar="NAME")


@click.group("queue")
def app() -> None:
    """
    List, pause and resume queues.
    """


@app.command("list")
@json_option
def list_queues(as_json: bool) -> None:
    """
    List queues with their waiting and running tasks, age and workers.
    """
    from asyncflow.cli.views import print_json, print_queues
    from asyncflow.store import queues

    found = run_with_database(queues.list_queues)
    if as_json:
        print_json("queues", found)
    else:
        print_queues(found)


@app.command()
@queue_argument
@click.option("--force", is_flag=True, help="Also pause a queue that does not exist yet.")
def pause(name: str, force: bool) -> None:
    """
    Stop starting tasks of a queue. Running tasks continue, and new ones are accepted.
    """
    from asyncflow.store import queues

    _change(name, queues.pause, force=force)
    click.echo(f"Queue {name!r} is paused.")


@app.command()
@queue_argument
def resume(name: str) -> None:
    """
    Start tasks of a paused queue again.
    """
    from asyncflow.store import queues

    _change(name, queues.resume)
    click.echo(f"Queue {name!r} is not paused.")


def _change(
    name: str, change: Callable[[Database, str], Awaitable[None]], *, force: bool = False
) -> None:
    from asyncflow.domain.policy import NAME_PATTERN
    from asyncflow.store import queues
    from asyncflow.store.wakeups import send_wakeup

    if not NAME_PATTERN.fullmatch(name):
        raise click.BadParameter(
            f"invalid queue name {name!r}: 1 to 128 characters from A-Z a-z 0-9 . _ -"
        )

    async def check_and_change(db: Database) -> None:
        if not force:
            await queues.check_exists(db, name)
        await change(db, name)
        await send_wakeup(db)

    run_with_database(check_and_change)
