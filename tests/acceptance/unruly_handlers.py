"""
Handlers whose asyncio tasks and callbacks try to end the process they run in.
"""

from __future__ import annotations

import asyncio
import sys
from typing import NoReturn

from asyncflow import handler


async def leave() -> NoReturn:
    sys.exit(0)


async def interrupt() -> NoReturn:
    raise KeyboardInterrupt


@handler(max_attempts=1)
async def exit_in_a_task() -> None:
    """
    `sys.exit()` two tasks below the handler's own, which awaits them.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.wait_for(leave(), 10))


@handler(max_attempts=1)
async def interrupt_in_a_task() -> None:
    """
    As Ctrl-C would.
    """
    await asyncio.gather(interrupt())


@handler(max_attempts=1)
async def exit_in_a_callback() -> str:
    """
    Nobody awaits a callback, so nothing is wrong with the handler.
    """
    asyncio.get_running_loop().call_soon(sys.exit)
    await asyncio.sleep(0.1)
    return "done"
