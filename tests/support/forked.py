"""
AsyncFlow processes that start with their imports already done.

Importing the program costs a process up to a second of CPU time, mostly for FastAPI and Pydantic,
and the tests start hundreds of processes. `multiprocessing` forks these from one that has already
imported it; from then on they behave as if started by `python -m`, as tests/cli and tests/verify
do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import asyncflow

LOADED = (
    "asyncflow.cli.app",
    "asyncflow.processes.api",
    "asyncflow.processes.worker",
    "asyncflow.processes.maintenance",
    *("asyncflow.api.app", "asyncflow.api.catalogue", "asyncflow.api.front.protocol", "uvicorn"),
    *("asyncflow.worker.worker", "asyncflow.handlers", "asyncflow.transport.rabbitmq.transport"),
    *("asyncflow.maintenance.chores", "asyncflow.relay.relay", "asyncflow.store.migrations"),
)

_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(list(LOADED))


def start(
    module: str,
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    python: Path | None = None,
) -> tuple[ForkServerProcess, Connection]:
    """
    Run `python -m module` with `arguments` in `folder`, as the leader of its own process group.

    Args:
        python: Another interpreter to run it, which imports the program itself.

    Returns:
        The process, and the reading end of a pipe with all its output.
    """
    ours, theirs = _forkserver.Pipe(duplex=False)
    with theirs:
        process = _forkserver.Process(
            target=_become,
            args=(module, list(arguments), dict(environment), folder, theirs, python),
            daemon=True,
        )
        process.start()
    return process, ours


def _become(
    module: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    output: Connection,
    python: Path | None,
) -> None:
    # The fork server silently ignores a failed preload.
    assert set(LOADED) <= set(sys.modules), "The fork server has not loaded the program."
    atexit._clear()
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with output, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if python is not None:
        source = str(Path(asyncflow.__file__).parents[1])
        os.environ["PYTHONPATH"] = source
        os.execv(python, [str(python), "-m", module, *arguments])
    sys.path.insert(0, str(folder))
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()
