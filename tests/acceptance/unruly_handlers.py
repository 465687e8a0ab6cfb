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
    Call `sys.exit()` two tasks below the handler's own task, which awaits them.
    """
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.wait_for(leave(), 10))


@handler(max_attempts=1)
async def interrupt_in_a_task() -> None:
    """
    Raise `KeyboardInterrupt` in a task, as Ctrl-C would.
    """
    await asyncio.gather(interrupt())


@handler(max_attempts=1)
async def exit_in_a_callback() -> str:
    """
    Exit in a callback; nothing awaits it, so the handler itself succeeds.
    """
    asyncio.get_running_loop().call_soon(sys.exit)
    await asyncio.sleep(0.1)
    return "done"
