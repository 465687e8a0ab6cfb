"""
The handlers of a run. Every execution is recorded, see `history`.

A result names the lease it was produced under, so that the checker knows whose result was stored.
Histories go to `history` in the current folder, where the run starts its workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asyncflow import Backoff, Context, handler
from asyncflow.verify.history import History

BACKOFF = Backoff(base_seconds=0.2, factor=2.0, cap_seconds=1.0, jitter=False)
MAX_ATTEMPTS_OF_THE_DOOMED = 2

_histories: dict[int, History] = {}
_forked: list[int] = []


class PlannedFailure(Exception):
    """
    A failure that is part of the workload; its message names the lease.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(f"planned failure, lease={context.lease_id}")


def _history() -> History:
    # By process id, because a forked child inherits this variable.
    pid = os.getpid()
    if pid not in _histories:
        _histories[pid] = History(Path("history"), f"handler-{pid}")
    return _histories[pid]


@contextmanager
def _written_down(context: Context, isolation: str) -> Iterator[None]:
    facts = {
        "task": str(context.task_id),
        "lease": str(context.lease_id),
        "attempt": context.attempt,
        "pid": os.getpid(),
        "isolation": isolation,
    }
    _history().write("start", name=context.name, **facts)
    how = "stopped"
    try:
        yield
        how = "returned"
    except Exception:
        how = "raised"
        raise
    finally:
        _history().write("end", how=how, **facts)


def _result(context: Context, submission: int, pad: str, **more: Any) -> dict[str, Any]:
    return {
        "submission": submission,
        "digest": hashlib.sha256(pad.encode()).hexdigest()[:16],
        "lease": str(context.lease_id),
        "attempt": context.attempt,
        **more,
    }


@handler("verify.sleep", backoff=BACKOFF)
async def sleep(
    context: Context, submission: int, pad: str = "", seconds: float = 0.0
) -> dict[str, Any]:
    """
    Sleep this long.
    """
    with _written_down(context, "loop"):
        if seconds:
            await asyncio.sleep(seconds)
        return _result(context, submission, pad)


@handler("verify.fail", backoff=BACKOFF)
async def fail(
    context: Context, submission: int, times: int, pad: str = "", seconds: float = 0.0
) -> dict[str, Any]:
    """
    Fail the first `times` attempts.
    """
    with _written_down(context, "loop"):
        if seconds:
            await asyncio.sleep(seconds)
        if context.attempt <= times:
            raise PlannedFailure(context)
        return _result(context, submission, pad)


@handler("verify.doom", backoff=BACKOFF, max_attempts=MAX_ATTEMPTS_OF_THE_DOOMED)
async def doom(context: Context, submission: int, pad: str = "") -> None:
    """
    Fail every attempt.
    """
    with _written_down(context, "loop"):
        raise PlannedFailure(context)


@handler("verify.crunch", isolation="process", backoff=BACKOFF)
def crunch(
    context: Context, submission: int, pad: str = "", seconds: float = 0.0
) -> dict[str, Any]:
    """
    Keep a processor busy this long.
    """
    with _written_down(context, "process"):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pass
        return _result(context, submission, pad)


@handler(
    "verify.exit", isolation="process", backoff=BACKOFF, max_attempts=MAX_ATTEMPTS_OF_THE_DOOMED
)
def exit_(context: Context, submission: int, pad: str = "") -> None:
    """
    End the child process without an outcome.
    """
    with _written_down(context, "process"):
        os._exit(9)


@handler(
    "verify.stubborn",
    isolation="process",
    backoff=BACKOFF,
    max_attempts=MAX_ATTEMPTS_OF_THE_DOOMED,
    timeout_seconds=0.5,
)
def stubborn(context: Context, submission: int, pad: str = "", seconds: float = 30.0) -> None:
    """
    Exceed the time limit and ignore the request to stop.
    """
    with _written_down(context, "process"):
        time.sleep(seconds)


@handler("verify.fork", isolation="thread", backoff=BACKOFF)
def fork(context: Context, submission: int, pad: str = "", seconds: float = 5.0) -> dict[str, Any]:
    """
    Leave a forked child behind, which must not hold its worker's locks and signal handlers.
    """
    with _written_down(context, "thread"):
        _reap_forked()
        pid = os.fork()
        if pid == 0:
            time.sleep(seconds)
            os._exit(0)
        _forked.append(pid)
        return _result(context, submission, pad)


def _reap_forked() -> None:
    for pid in tuple(_forked):
        # Another thread may have reaped it.
        with contextlib.suppress(ChildProcessError, ValueError):
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                _forked.remove(pid)


@handler("verify.big", backoff=BACKOFF)
async def big(
    context: Context, submission: int, pad: str = "", size: int = 200_000
) -> dict[str, Any]:
    """
    Return a large result.
    """
    with _written_down(context, "loop"):
        return _result(context, submission, pad, blob="x" * size)
