"""
The handlers that every worker has.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from annotated_types import Interval

from asyncflow.handlers.arguments import DIALECT
from asyncflow.handlers.context import Context
from asyncflow.handlers.registry import DEFAULT_REGISTRY, Handler

BUILTIN_NAMES = frozenset({"sample-task"})
STEPS = 20
"""How often `sample-task` reports its progress."""


async def sample_task(
    context: Context,
    seconds: Annotated[float, Interval(ge=0, le=3600)] = 5.0,
    filler: str = "",
) -> dict[str, Any]:
    """
    Simulate `seconds` of processing, 0 to 3600, and report progress meanwhile.

    For trying AsyncFlow out and for measuring it; it needs nothing and changes nothing. The
    `filler` makes a payload as large as is wanted.
    """
    for step in range(STEPS if seconds else 0):
        context.progress(step / STEPS, f"{seconds * step / STEPS:g} of {seconds:g} seconds")
        await asyncio.sleep(seconds / STEPS)
    return {"message": f"Processed for {seconds:g} seconds.", "seconds": seconds}


# Every worker publishes this schema. Written out, it spares those whose own handlers need no
# Pydantic to import that: 10 MB.
DEFAULT_REGISTRY.add(
    Handler(
        name="sample-task",
        function=sample_task,
        known_schema={
            "$schema": DIALECT,
            "additionalProperties": False,
            "properties": {
                "seconds": {
                    "default": 5.0,
                    "maximum": 3600,
                    "minimum": 0,
                    "title": "Seconds",
                    "type": "number",
                },
                "filler": {"default": "", "title": "Filler", "type": "string"},
            },
            "title": "Payload",
            "type": "object",
        },
    )
)
