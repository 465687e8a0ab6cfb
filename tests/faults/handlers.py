"""
What the tasks of the sweep run: one handler in each isolation.

A child process, which starts by itself and imports this, plants its failpoint here.
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
    Fail the first `failures` attempts; for the first one, take a minute if it `lingers`.
    Begin to count `seconds` when the failpoint has fired if it is to run `until_fired`.
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
    The same in a thread.
    """
    note(context, "start")
    note(context, "end")
    return {"attempt": context.attempt}


@handler(backoff=QUICKLY, max_attempts=5, isolation="process")
def step_in_process(context: Context) -> dict[str, Any]:
    """
    The same in a child process.
    """
    note(context, "start")
    note(context, "end")
    return {"attempt": context.attempt}


if is_child():
    plant_from_environment(in_child=True)
