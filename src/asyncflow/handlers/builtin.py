"""
The handlers that every worker has.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from annotated_types import Interval

from asyncflow.handlers.context import Context
from asyncflow.handlers.registry import handler

STEPS = 20
"""How often `sample-task` reports its progress."""


@handler("sample-task")
async def sample_task(
    context: Context, seconds: Annotated[float, Interval(ge=0, le=3600)] = 5.0
) -> dict[str, Any]:
    """
    Simulate `seconds` of processing, 0 to 3600, and report progress meanwhile.

    For trying AsyncFlow out and for measuring it; it needs nothing and changes nothing.
    """
    for step in range(STEPS if seconds else 0):
        context.progress(step / STEPS, f"{seconds * step / STEPS:g} of {seconds:g} seconds")
        await asyncio.sleep(seconds / STEPS)
    return {"message": f"Processed for {seconds:g} seconds.", "seconds": seconds}
