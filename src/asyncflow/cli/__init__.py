"""
The command line: `asyncflow …`.

    app          every command, its options, and what it starts
    dev          all of AsyncFlow on this machine under one parent
    tasks        looking at tasks and steering them, over the store
    queues       pausing and resuming queues
    views        tasks as a person wants to see them
    database     which database a command means
    output       output that may lose its reader

Commands import what they run when they run: a worker starts without the web framework, the
migrations and Rich. No command decides anything; that is `processes`' and the store's.
"""

from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """
    Run the command that the arguments name, and end.
    """
    # Before the imports of the commands, which take longer than everything else here.
    from asyncflow.cli.output import open_streams
    from asyncflow.first_process import step_aside

    open_streams()
    step_aside()

    from asyncflow.cli.app import run_command
    from asyncflow.stopping import end

    end(run_command())
