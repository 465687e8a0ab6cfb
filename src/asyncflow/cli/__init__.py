"""
The command line: `asyncflow …`.

    app          every command, its options, and what it starts
    dev          API, worker, maintenance and PostgreSQL on this machine under one parent
    tasks        showing, listing and changing tasks
    queues       listing, pausing and resuming queues
    bench        measuring a deployment; `measuring` does the work
    doctor       checking the servers
    views        tasks, queues and workers as text
    database     the database a command works on
    output       standard streams that are closed at the start

Commands import what they run when they run: a worker starts without the web framework, the
migrations and Rich. No command makes decisions; those belong to `processes` and the store.
"""

from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """
    Run the command that the arguments name, and exit.
    """
    # Before importing the commands, which takes longer than everything else here.
    from asyncflow.cli.output import open_streams
    from asyncflow.first_process import step_aside

    open_streams()
    step_aside()

    from asyncflow.cli.app import run_command
    from asyncflow.stopping import end

    end(run_command())
