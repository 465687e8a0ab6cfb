"""
Handlers for the acceptance tests. They record every execution, see `journal`.

They take their payloads as plain dicts: a process without typed handlers starts in half the time,
and the tests start a thousand.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from asyncflow import Backoff, Context, Reject, Retry, handler

QUICKLY = Backoff(base_seconds=0.2, factor=2.0, cap_seconds=1.0, jitter=False)


def note(context: Context, what: str) -> None:
    """
    Append one line to the journal, in a single write.
    """
    line = f"{time.monotonic()} {what} {context.task_id} {context.attempt} {os.getpid()}\n"
    file = os.open(os.environ["ASYNCFLOW_TEST_JOURNAL"], os.O_WRONLY | os.O_APPEND)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


@handler
async def work(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """
    Wait in the worker's event loop.
    """
    note(context, "start")
    await asyncio.sleep(payload.get("seconds", 0))
    note(context, "end")
    return {"attempt": context.attempt}


@handler
def work_in_thread(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """
    Wait in a thread, ignoring every request to stop.
    """
    note(context, "start")
    time.sleep(payload.get("seconds", 0))
    note(context, "end")
    return {"attempt": context.attempt}


@handler(isolation="process", backoff=QUICKLY)
def work_in_process(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """
    Wait in a child process, ignoring every request to stop.
    """
    note(context, "start")
    time.sleep(payload.get("seconds", 0))
    note(context, "end")
    return {"attempt": context.attempt}


@handler(isolation="process")
def crunch(context: Context, payload: dict[str, Any]) -> int:
    """
    Keep a CPU busy in pure Python, without ever releasing the interpreter for long.
    """
    note(context, "start")
    rounds, until = 0, time.monotonic() + payload.get("seconds", 0)
    while time.monotonic() < until:
        rounds += 1
    note(context, "end")
    return rounds


@handler(backoff=QUICKLY, max_attempts=5)
async def flaky(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """
    Fail the first `failures` attempts of a generation.
    """
    note(context, "start")
    if context.attempt <= payload["failures"]:
        raise ConnectionError(f"attempt {context.attempt} failed")
    note(context, "end")
    return {"attempt": context.attempt}


@handler(backoff=QUICKLY, max_attempts=2)
async def broken(context: Context, payload: dict[str, Any]) -> str:
    """
    Fail with a recognisable traceback until attempt number `until_attempt`.
    """
    note(context, "start")
    if context.attempt < payload.get("until_attempt", 1_000):
        _find_the_fault()
    return "mended"


def _find_the_fault() -> None:
    raise LookupError("nothing to find")


@handler
async def picky(context: Context, payload: dict[str, Any]) -> None:
    """
    Ask for another attempt once, then reject the task.
    """
    note(context, "start")
    if "after_seconds" in payload and context.attempt == 1:
        raise Retry(after_seconds=payload["after_seconds"])
    raise Reject("not for me")


@handler(queue="side-lane")
async def sidelined(context: Context) -> None:
    """
    A handler with its own queue.
    """
    note(context, "start")


@handler(isolation="process", backoff=QUICKLY, max_attempts=3)
def kill_child(context: Context) -> None:
    """
    End the child process abruptly.
    """
    note(context, "start")
    os._exit(9)


@handler(backoff=QUICKLY, max_attempts=2)
async def kill_worker(context: Context) -> None:
    """
    Kill the whole worker.
    """
    note(context, "start")
    os.kill(os.getpid(), signal.SIGKILL)
