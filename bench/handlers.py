"""
The handlers that AsyncFlow's workers run in the benchmark.
"""

from __future__ import annotations

import asyncio

from asyncflow import Backoff, Context, handler
from bench.probe import hit


@handler("bench-noop")
async def noop(number: int = -1, submitted_at: float = 0.0, text: str = "") -> None:
    """
    Do nothing.
    """
    hit(number, submitted_at)


@handler("bench-flaky", backoff=Backoff(base_seconds=0.5))
async def flaky(context: Context, fails_first: bool = False) -> None:
    """
    Do nothing, or fail the first attempt.
    """
    hit()
    if fails_first and context.attempt == 1:
        raise ValueError("the first attempt fails")


@handler("bench-wait")
async def wait(seconds: float) -> None:
    """
    Wait, like a task that calls another service.
    """
    hit()
    await asyncio.sleep(seconds)
