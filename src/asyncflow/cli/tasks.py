"""
`asyncflow task …`: show, list and change tasks.

With `--json` a command prints what the HTTP API would return; without it, see `views`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

import click

if TYPE_CHECKING:
    from asyncflow.domain.task import Task
    from asyncflow.store.database import Database
    from asyncflow.store.read import Page

Result = TypeVar("Result")

task_argument = click.argument("task_id", metavar="ID", type=click.UUID)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, as the HTTP API returns it."
)


@click.group("task")
def app() -> None:
    """
    Show, list, cancel, redrive and run tasks.
    """


@app.command()
@task_argument
@json_option
def get(task_id: UUID, as_json: bool) -> None:
    """
    Show everything about one task.
    """
    from asyncflow.settings import load_settings
    from asyncflow.store import read

    through_relay = load_settings().broker_url is not None
    task = run_with_database(
        lambda db: read.get(db, _tenant_id(), task_id, through_relay=through_relay)
    )
    _show(task, as_json)


@app.command("list")
@click.option(
    "--status",
    "statuses",
    multiple=True,
    help="For example FAILED or running; repeat for several.",
)
@click.option("--name", help="Name of the handler.")
@click.option("--queue", help="Name of the queue.")
@click.option(
    "--limit",
    type=click.IntRange(1, 500),
    default=20,
    show_default=True,
    help="Maximum number of tasks.",
)
@click.option("--cursor", help="Continue from this cursor.")
@json_option
def list_tasks(
    statuses: Sequence[str],
    name: str | None,
    queue: str | None,
    limit: int,
    cursor: str | None,
    as_json: bool,
) -> None:
    """
    List tasks, newest first.
    """
    from asyncflow.store import read

    for status in statuses:
        if status.upper() not in read.STATUS_FILTERS:
            known = ", ".join(read.STATUS_FILTERS)
            raise click.BadParameter(
                f"unknown status {status!r}; one of {known}", param_hint="--status"
            )

    async def read_page(db: Database) -> Page:
        return await read.list_tasks(
            db,
            _tenant_id(),
            statuses=[status.upper() for status in statuses],
            name=name,
            queue=queue,
            cursor=cursor,
            limit=limit,
        )

    page = run_with_database(read_page)
    if as_json:
        from asyncflow.api.views import page_json

        click.echo(page_json(page))
    else:
        from asyncflow.cli.views import print_page

        print_page(page)


@app.command()
@task_argument
@json_option
def cancel(task_id: UUID, as_json: bool) -> None:
    """
    Cancel a waiting task, or ask its worker to stop a running one.
    """
    from asyncflow.store import steer

    _show(run_with_database(lambda db: steer.cancel(db, _tenant_id(), task_id)), as_json)


@app.command("run-now")
@task_argument
@json_option
def run_now(task_id: UUID, as_json: bool) -> None:
    """
    Make a scheduled or retrying task due now.
    """
    from asyncflow.store import steer

    _show(run_with_database(_waking(lambda db: steer.run_now(db, _tenant_id(), task_id))), as_json)


@app.command()
@task_argument
@json_option
def redrive(task_id: UUID, as_json: bool) -> None:
    """
    Run a failed or cancelled task again, with all its attempts.
    """
    from asyncflow.store import steer

    _show(run_with_database(_waking(lambda db: steer.redrive(db, _tenant_id(), task_id))), as_json)


def _waking(
    change: Callable[[Database], Coroutine[Any, Any, Task]],
) -> Callable[[Database], Coroutine[Any, Any, Task]]:
    from asyncflow.store.wakeups import send_wakeup

    async def changed(db: Database) -> Task:
        task = await change(db)
        await send_wakeup(db)
        return task

    return changed


def run_with_database(operation: Callable[[Database], Coroutine[Any, Any, Result]]) -> Result:
    """
    Run one operation on the configured database and return its result.
    """
    from asyncflow.cli.database import opened
    from asyncflow.settings import load_settings

    async def run() -> Result:
        async with opened(load_settings()) as db:
            return await operation(db)

    return asyncio.run(run())


def _show(task: Task, as_json: bool) -> None:
    if as_json:
        from asyncflow.api.views import task_json

        click.echo(task_json(task))
    else:
        from asyncflow.cli.views import print_task

        print_task(task)


def _tenant_id() -> int:
    from asyncflow.domain.task import DEFAULT_TENANT_ID

    return DEFAULT_TENANT_ID
