"""
Who blocks an event loop, as another thread sees it.

The stack tells where the loop's thread is. Whose code that is, the context of the asyncio task
that runs tells: what a handler calls, awaits or starts as a task of its own has a copy of the
handler's context. Only for a callback that a handler left in the loop there is no such trace.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import traceback
from types import FrameType
from typing import Any, NamedTuple

from asyncflow.handlers.context import CURRENT, Context
from asyncflow.handlers.encoding import clip_traceback

CALLERS = ("asyncflow.handlers.calls", "asyncflow.processes.process")
"""What calls handlers, and what runs the loop; whatever is further out on the stack is ours."""


class Stall(NamedTuple):
    """
    A loop that stands still.

    Attributes:
        stack: Where, as a traceback, outermost call first; from the handler on if one is found.
        context: Of the attempt whose code that is; None if nobody can tell.
    """

    stack: str
    context: Context | None


def look_at(loop: asyncio.AbstractEventLoop, thread_id: int) -> Stall:
    """
    See what the thread that runs this loop is doing. From another thread.
    """
    frames, caller = _frames_of_handler(sys._current_frames().get(thread_id))
    lines = traceback.StackSummary.extract(reversed(frames)).format()
    stack = clip_traceback("Traceback (most recent call last):\n" + "".join(lines))
    return Stall(stack, _context_in(caller) or _context_of(asyncio.current_task(loop)))


def _frames_of_handler(
    frame: FrameType | None,
) -> tuple[list[tuple[FrameType, int]], FrameType | None]:
    """
    The frames up to what called the handler, innermost first, and that one.
    """
    frames: list[tuple[FrameType, int]] = []
    while frame is not None and frame.f_globals.get("__name__") not in CALLERS:
        frames.append((frame, frame.f_lineno))
        frame = frame.f_back
    return frames, frame


def _context_in(caller: FrameType | None) -> Context | None:
    found = None if caller is None else caller.f_locals.get("context")
    return found if isinstance(found, Context) else None


def _context_of(task: asyncio.Task[Any] | None) -> Context | None:
    # Before Python 3.12 a task does not tell its context, but the garbage collector knows it. It
    # also knows that of whoever waits for the task, which is of the same attempt or of none.
    if task is None:
        return None
    contexts = [c for c in gc.get_referents(task) if isinstance(c, contextvars.Context)]
    attempts = {id(found): found for c in contexts if (found := c.get(CURRENT)) is not None}
    return next(iter(attempts.values())) if len(attempts) == 1 else None
