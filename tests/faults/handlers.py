"""
The handlers of the sweep's tasks, one per isolation.

A worker's child process imports this module, which plants the child's failpoint.
"""

from __future__ import annotations

import asyncio
from typing import Any

from asyncflow import Context, handler
from tests.faults.failpoints import has_fired, is_child, plant_from_environment
from tests.support.handlers import QUICKLY, note

LINGER_SECONDS = 60.0
POLL_SECONDS = 0.02


@handler(backoff=QUICKLY, max_attempts=5)
async def step_in_loop(context: Context, payload: dict[str, Any]) -> dict[str, Any]:
    """
    Fail the first `failures` attempts; if it `lingers`, the first one takes a minute. With
    `until_fired`, start counting `seconds` once the failpoint has fired.
    """
    note(context, "start")
    if context.attempt <= payload.get("failures", 0):
        raise ConnectionError(f"attempt {context.attempt} failed")
    while payload.get("until_fired") and not has_fired():  # noqa: ASYNC110 - another thread fires
        await asyncio.sleep(POLL_SECONDS)
    lingers = payload.get("lingers", False) and context.attempt == 1
    await asyncio.sleep(LINGER_SECONDS if lingers else payload.get("seconds", 0))
    note(context, "end")
    return {"attempt": context.attempt}


@handler(backoff=QUICKLY, max_attempts=5)
def step_in_thread(context: Context) -> dict[str, Any]:
    """
    Return immediately, from a thread.
    """
    note(context, "start")
    note(context, "end")
    return {"attempt": context.attempt}


@handler(backoff=QUICKLY, max_attempts=5, isolation="process")
def step_in_process(context: Context) -> dict[str, Any]:
    """
    Return immediately, from a child process.
    """
    note(context, "start")
    note(context, "end")
    return {"attempt": context.attempt}


if is_child():
    plant_from_environment(in_child=True)
