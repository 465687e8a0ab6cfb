"""
Every command, its options, and what it starts.

Options only override settings; what a setting means is in `settings` and `.env.example`.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from asyncflow.cli import bench, doctor, queues, tasks
from asyncflow.errors import (
    AsyncFlowError,
    ExitStatus,
    InvalidSettings,
)
from asyncflow.processes.supervisor import CHILD_OPTION
from asyncflow.verify.command import verify

if TYPE_CHECKING:
    from asyncflow.settings import Settings

FROM_SETTINGS = "from settings"
"""The value of a URL option that is given without a URL."""


@click.group(
    name="asyncflow",
    help="AsyncFlow: durable distributed task processing.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(CHILD_OPTION, "supervised", is_flag=True, hidden=True)
@click.version_option(package_name="asyncflow", message="%(version)s")
def app(supervised: bool) -> None:
    if supervised:
        from asyncflow.processes.supervisor import stop_with_parent

        stop_with_parent()


app.add_command(tasks.app)
app.add_command(queues.app)
app.add_command(bench.bench)
app.add_command(doctor.doctor)
app.add_command(verify)

OPTIONS = {
    "api_host": "--host",
    "api_port": "--port",
    "database_url": "--database-url",
    "broker_url": "--broker-url",
    "worker_queues": "--queues",
    "worker_slots": "--slots",
    "worker_processes": "--processes",
    "worker_handlers": "--handlers",
}
"""The option that overrides each setting."""

host_option = click.option("--host", help="Address to listen on.")
port_option = click.option("--port", type=int, help="Port to listen on.")
slots_option = click.option(
    "--slots", type=int, help="Number of tasks a worker process runs at a time."
)
handlers_option = click.option(
    "--handlers",
    multiple=True,
    metavar="MODULE,…",
    help="Modules with handlers, for example billing.tasks or billing/tasks.py.",
)


def run_command() -> int:
    """
    Run the command that the arguments name; return the exit status.

    An error that AsyncFlow raises on purpose is printed to standard error as a sentence, and the
    exit status is the error's.
    """
    try:
        status = app.main(prog_name="asyncflow", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except AsyncFlowError as error:
        click.echo(f"asyncflow: {_sentences(error)}", err=True)
        return error.exit_status
    except click.Abort:
        return ExitStatus.INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return ExitStatus.NOT_NOW
    return int(status or 0)


def _sentences(error: AsyncFlowError) -> str:
    if isinstance(error, InvalidSettings) and len(error.mistakes) > 1:
        return "\n  ".join(["Invalid settings:", *error.mistakes])
    return str(error)


@app.command()
@host_option
@port_option
@slots_option
@handlers_option
@click.option(
    "--database-url",
    is_flag=False,
    flag_value=FROM_SETTINGS,
    metavar="[URL]",
    help="Migrate and use this database. Without a URL: ASYNCFLOW_DATABASE_URL.",
)
@click.option(
    "--broker-url",
    is_flag=False,
    flag_value=FROM_SETTINGS,
    metavar="[URL]",
    help="Use this RabbitMQ. Without a URL: ASYNCFLOW_BROKER_URL.",
)
@click.option("--yes", is_flag=True, help="Use the configured database without asking.")
def dev(
    host: str | None,
    port: int | None,
    slots: int | None,
    handlers: Sequence[str],
    database_url: str | None,
    broker_url: str | None,
    yes: bool,
) -> None:
    """
    Run API, worker and maintenance on this machine, with an embedded PostgreSQL.

    Data is stored in .asyncflow/ in the current folder. ASYNCFLOW_DATABASE_URL and
    ASYNCFLOW_BROKER_URL are ignored unless an option says to use them.
    """
    from asyncflow.cli.dev import chosen_servers, develop
    from asyncflow.processes.process import run

    settings = _settings(
        # For people, also when the output goes through `tee`.
        log_format="console",
        api_host=host,
        api_port=port,
        worker_slots=slots,
        worker_handlers=_names(handlers),
        database_url=_typed(database_url),
        broker_url=_typed(broker_url),
    )
    settings = chosen_servers(settings, database=database_url, broker=broker_url, confirmed=yes)
    _configure_logs(settings, "dev")
    run(partial(develop, settings))


def _typed(url: str | None) -> str | None:
    return None if url == FROM_SETTINGS else url


@app.command()
@click.option(
    "--lock-timeout",
    "lock_seconds",
    type=click.FloatRange(min=0),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for other migrations and for sessions that lock tables.",
)
def migrate(lock_seconds: float) -> None:
    """
    Migrate the database to this version's schema. Idempotent; safe to run concurrently.
    """
    from asyncflow.settings import masked, required_database_url
    from asyncflow.store.migrations import migrate as bring_up_to_date
    from asyncflow.store.schema import SCHEMA_VERSION

    url = required_database_url(_settings())
    say = partial(click.echo, err=True)
    before = asyncio.run(bring_up_to_date(url, lock_seconds=lock_seconds, say=say))
    if before is None or before < SCHEMA_VERSION:
        change = f"is now {SCHEMA_VERSION}"
    elif before == SCHEMA_VERSION:
        change = f"is already {before}"
    else:
        change = f"is {before}, which also serves this version ({SCHEMA_VERSION})"
    click.echo(f"The schema of {masked(url)} {change}.")


@app.command()
@click.argument("role")
def grants(role: str) -> None:
    """
    Print the SQL that lets ROLE run everything except migrations.
    """
    from asyncflow.store.grants import grants_for

    click.echo(grants_for(role), nl=False)


@app.command()
@host_option
@port_option
def api(host: str | None, port: int | None) -> None:
    """
    Serve the HTTP API.
    """
    from asyncflow.processes.api import serve_api
    from asyncflow.processes.process import run

    settings = _settings(api_host=host, api_port=port)
    _configure_logs(settings, "api")
    run(partial(serve_api, settings))


@app.group(invoke_without_command=True)
@click.option(
    "--queues",
    metavar="NAME,…",
    help="Queues to take tasks from. Default: the queues of its handlers.",
)
@slots_option
@click.option("--processes", type=int, help="Number of worker processes.")
@handlers_option
@click.pass_context
def worker(
    context: click.Context,
    queues: str | None,
    slots: int | None,
    processes: int | None,
    handlers: Sequence[str],
) -> None:
    """
    Run tasks. `worker list` shows the workers that do.
    """
    if context.invoked_subcommand is not None:
        return
    settings = _settings(
        worker_queues=queues,
        worker_slots=slots,
        worker_processes=processes,
        worker_handlers=_names(handlers),
    )
    _configure_logs(settings, "worker")
    from asyncflow.processes.process import run
    from asyncflow.processes.worker import work

    run(partial(_several_workers if settings.worker_processes > 1 else work, settings))


@worker.command("list")
@tasks.json_option
def list_workers(as_json: bool) -> None:
    """
    List live workers with their queues, load and last heartbeat.
    """
    from asyncflow.cli.views import print_json, print_workers
    from asyncflow.store import workers

    found = tasks.run_with_database(workers.list_workers)
    if as_json:
        print_json("workers", found)
    else:
        print_workers(found)


@app.command()
def maintenance() -> None:
    """
    Recover tasks of dead workers, prune old tasks, send hints to RabbitMQ. Run two.
    """
    from asyncflow.processes.maintenance import maintain
    from asyncflow.processes.process import run

    settings = _settings()
    _configure_logs(settings, "maintenance")
    run(partial(maintain, settings))


@app.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def psql(arguments: Sequence[str]) -> None:
    """
    Open psql on AsyncFlow's database; arguments are passed on to psql.
    """
    from asyncflow.cli.database import become_psql

    become_psql(_settings(), arguments)


@app.command()
def version() -> None:
    """
    Print the version.
    """
    from asyncflow import __version__

    click.echo(__version__)


async def _several_workers(settings: Settings) -> int:
    from asyncflow.processes.supervisor import SupervisedProcess, Supervisor, as_environment

    one = replace(settings, worker_processes=1)
    children = [
        SupervisedProcess(f"worker {number}", ["worker"], as_environment(one))
        for number in range(1, settings.worker_processes + 1)
    ]
    with Supervisor(grace_seconds=settings.shutdown_grace_seconds) as supervisor:
        return await supervisor.run(children)


def _settings(**overrides: object) -> Settings:
    from asyncflow.settings import load_settings

    return load_settings(OPTIONS, **overrides)


def _configure_logs(settings: Settings, process: str) -> None:
    from asyncflow.settings import unknown_variables
    from asyncflow.telemetry import events
    from asyncflow.telemetry.logs import configure_logs
    from asyncflow.telemetry.streams import guard_standard_streams

    guard_standard_streams()
    configure_logs(level=settings.log_level, log_format=settings.log_format, process=process)
    is_child = click.get_current_context().find_root().params["supervised"]
    if not is_child and (unknown := unknown_variables()):
        events.settings_unknown(names=unknown)


def _names(handlers: Sequence[str]) -> str | None:
    return ",".join(handlers) if handlers else None
