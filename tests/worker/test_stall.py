"""
Another thread can tell which handler blocks an event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

from asyncflow.handlers import Handler, Registry, handler
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.stall import Stall, look_at
from tests.worker.test_isolation import a_context, begin

PATIENCE_SECONDS = 30.0


class Blockade:
    """
    Blocks where `block` is called, until another thread has inspected the loop.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread_id = threading.get_ident()
        self._is_blocked, self._was_seen = threading.Event(), threading.Event()
        self.seen: list[Stall] = []

    def block(self) -> None:
        """
        Block the loop.
        """
        self._is_blocked.set()
        assert self._was_seen.wait(PATIENCE_SECONDS)

    def look(self) -> None:
        """
        In a thread: wait until the loop is blocked, inspect it, and release it.
        """
        assert self._is_blocked.wait(PATIENCE_SECONDS)
        self.seen.append(look_at(self._loop, self._thread_id))
        self._was_seen.set()


async def seen_of(
    function_of: Callable[[Blockade], Callable[[], Awaitable[None]]],
) -> tuple[Stall, str]:
    """
    What is found about a handler that blocks the loop, and the id of its task.
    """
    blockade = Blockade()
    registry = Registry()
    handler("blocks", registry=registry)(function_of(blockade))
    context = a_context()
    watching = threading.Thread(target=blockade.look)
    watching.start()
    _, ended = begin(Isolation(slots=1), _the_one(registry), context)
    await ended
    watching.join()
    return blockade.seen[0], str(context.task_id)


def _the_one(registry: Registry) -> Handler:
    [found] = registry
    return found


async def test_a_handler_that_blocks_is_seen() -> None:
    """
    A blocking handler is identified, with a stack that begins in the handler.
    """

    def function_of(blockade: Blockade) -> Callable[[], Awaitable[None]]:
        async def blocks() -> None:
            blockade.block()

        return blocks

    stall, task_id = await seen_of(function_of)

    assert stall.context is not None
    assert task_id == str(stall.context.task_id)
    assert "in blocks" in stall.stack.splitlines()[1]
    assert "self._was_seen.wait" in stall.stack


async def test_a_task_that_a_handler_started_is_the_handlers() -> None:
    """
    A task that a handler started is attributed to the handler, whose context it copied.
    """

    def function_of(blockade: Blockade) -> Callable[[], Awaitable[None]]:
        async def part() -> None:
            blockade.block()

        async def blocks() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(part())

        return blocks

    stall, task_id = await seen_of(function_of)

    assert stall.context is not None
    assert task_id == str(stall.context.task_id)
    assert "in part" in stall.stack


async def test_of_a_callback_only_the_stack_is_seen() -> None:
    """
    For a callback only the stack is found, since no task runs it.
    """

    def function_of(blockade: Blockade) -> Callable[[], Awaitable[None]]:
        async def blocks() -> None:
            called = asyncio.get_running_loop().create_future()

            def callback() -> None:
                blockade.block()
                called.set_result(None)

            asyncio.get_running_loop().call_soon(callback)
            await called

        return blocks

    stall, _ = await seen_of(function_of)

    assert stall.context is None
    assert "in callback" in stall.stack
