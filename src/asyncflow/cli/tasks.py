"""
`asyncflow task …`: looking at tasks and steering them.

With `--json` a command prints what the HTTP API would answer; without, see `views`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from uuid import UUID

import typer

if TYPE_CHECKING:
    from asyncflow.store.database import Database
    from asyncflow.store.tasks import Page, Task

app = typer.Typer(help="Look at tasks and steer them.", no_args_is_help=True, rich_markup_mode=None)

Result = TypeVar("Result")

Id = Annotated[UUID, typer.Argument(metavar="ID", help="The task.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, as the HTTP API answers.")]


@app.command()
def get(task_id: Id, as_json: Json = False) -> None:
    """
    Show everything about one task.
    """
    from asyncflow.store import tasks

    _show(_run(lambda db: tasks.get(db, _tenant_id(), task_id)), as_json)


@app.command("list")
def list_tasks(
    status: Annotated[
        str | None, typer.Option(help="Such as FAILED or running.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the handler.", show_default=False)] = None,
    queue: Annotated[str | None, typer.Option(help="Of this queue.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(help="At most so many.", min=1, max=500)] = 20,
    cursor: Annotated[
        str | None,
        typer.Option(help="Go on where the page before ended.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """
    List tasks, newest first.
    """
    from asyncflow.store import tasks

    if status is not None and status.upper() not in tasks.STATUS_FILTERS:
        statuses = ", ".join(tasks.STATUS_FILTERS)
        raise typer.BadParameter(f"{status!r} is none of {statuses}", param_hint="--status")

    async def read(db: Database) -> Page:
        return await tasks.list_tasks(
            db,
            _tenant_id(),
            status=status.upper() if status else None,
            name=name,
            queue=queue,
            cursor=cursor,
            limit=limit,
        )

    page = _run(read)
    if as_json:
        from asyncflow.api.views import page_json

        typer.echo(page_json(page))
    else:
        from asyncflow.cli.views import print_page

        print_page(page)


@app.command()
def cancel(task_id: Id, as_json: Json = False) -> None:
    """
    Cancel a waiting task, or ask the worker of a running one to stop it.
    """
    from asyncflow.store import tasks

    _show(_run(lambda db: tasks.cancel(db, _tenant_id(), task_id)), as_json)


@app.command()
def redrive(task_id: Id, as_json: Json = False) -> None:
    """
    Give a failed or cancelled task a new generation, due now.
    """
    from asyncflow.store import tasks
    from asyncflow.store.wakeups import send_wakeup

    async def change(db: Database) -> Task:
        task = await tasks.redrive(db, _tenant_id(), task_id)
        await send_wakeup(db)
        return task

    _show(_run(change), as_json)


def _run(operation: Callable[[Database], Coroutine[Any, Any, Result]]) -> Result:
    from asyncflow.cli.database import opened
    from asyncflow.settings import load_settings

    async def run() -> Result:
        async with opened(load_settings()) as db:
            return await operation(db)

    return asyncio.run(run())


def _show(task: Task, as_json: bool) -> None:
    if as_json:
        from asyncflow.api.views import task_json

        typer.echo(task_json(task))
    else:
        from asyncflow.cli.views import print_task

        print_task(task)


def _tenant_id() -> int:
    from asyncflow.domain.task import DEFAULT_TENANT_ID

    return DEFAULT_TENANT_ID
