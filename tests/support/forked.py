"""
Processes of ours that begin where their imports are done.

Loading the program costs a process up to a second of a core, most of it FastAPI's and
pydantic's, and the tests start hundreds. These are forked from one that has loaded it already, by
`multiprocessing`; whatever follows is as if `python -m` had started them, which is what tests/cli
and tests/verify do.
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
    Run `python -m module` with `arguments` in `folder`, as the leader of its own group.

    Args:
        python: Another one to run it, which loads the program itself.

    Returns:
        The process, and the end of a pipe at which all that it prints can be read.
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
    # A preload that fails is passed over in silence.
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
