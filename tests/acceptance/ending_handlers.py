"""
Handlers that make it hard for their worker to exit.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from asyncflow import handler

STAYS_SECONDS = 300


@handler(max_attempts=1)
async def block_the_loop() -> None:
    """
    Block the event loop, so that nothing else runs on it.
    """
    time.sleep(STAYS_SECONDS)


@handler(max_attempts=1)
async def wait_in_threads(payload: dict[str, int]) -> None:
    """
    Occupy more threads than Python's default executor has.
    """
    waiting = [asyncio.to_thread(time.sleep, STAYS_SECONDS) for _ in range(payload["count"])]
    await asyncio.gather(*waiting)


@handler(max_attempts=1)
def leave_an_orphan() -> None:
    """
    Start a grandchild process that outlives its parent.
    """
    pid = os.fork()
    if pid == 0:
        if os.fork() == 0:
            time.sleep(0.05)
        os._exit(0)
    os.waitpid(pid, 0)


if "ASYNCFLOW_TEST_SLOW_IMPORT" in os.environ:
    Path(os.environ["ASYNCFLOW_TEST_SLOW_IMPORT"]).touch()
    time.sleep(STAYS_SECONDS)
