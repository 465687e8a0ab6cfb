"""
An event loop that stands still: which handler blocks it, and how its worker's attempts end.

All of this runs in another thread, while the loop's thread is blocked. The stack of that thread
shows where it is, and which call of a handler it is in. A task that a handler started has a copy
of the handler's context variables, which name the attempt. Only a callback that a handler left in
the loop cannot be traced to it.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

from asyncflow.domain.outcome import Failed, Failure, Settlement
from asyncflow.domain.states import Event
from asyncflow.handlers.context import CURRENT, Context
from asyncflow.handlers.encoding import clip_traceback
from asyncflow.store.settle import Settling
from asyncflow.store.workers import Held
from asyncflow.telemetry import events
from asyncflow.worker.attempt import Attempt
from asyncflow.worker.intake import LeaseKey

CALLERS = ("asyncflow.handlers.calls", "asyncflow.processes.process")
"""What calls handlers, and what runs the loop; whatever is further out on the stack is ours."""


class Stall(NamedTuple):
    """
    A loop that stands still.

    Attributes:
        stack: Where, as a traceback, outermost call first; from the handler on if one is found.
        context: Of the attempt whose code that is; None if that is unknown.
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


def end_of_stalled(
    stall: Stall, seconds: float, attempts: Mapping[LeaseKey, Attempt]
) -> Callable[[Held], Settling]:
    """
    Report a stall, stop what can be stopped, and say how each lease is to be settled.

    The attempt whose code blocks the loop has failed; the others are released, unless they had
    ended and only PostgreSQL's answer was not read.
    """
    blamed = _blamed(stall, attempts)
    events.worker_stalled(
        seconds=seconds,
        blamed=[(attempt.claim.task_id, attempt.claim.name) for attempt in blamed.values()],
        running=len(attempts),
        stack=stall.stack,
    )
    for attempt in attempts.values():
        attempt.abandon()
    failure = Failure("LoopBlocked", _what_it_did(seconds, len(blamed)), stall.stack)

    def settling(lease: Held) -> Settling:
        key = (lease.task_id, lease.lease_id)
        if key in blamed:
            settlement = blamed[key].decide(Failed(failure))
        else:
            # A lease without an attempt is a claim whose answer was not read.
            attempt = attempts.get(key)
            settlement = (attempt and attempt.settlement) or Settlement(Event.RELEASE)
        return Settling(lease.task_id, lease.lease_id, settlement)

    return settling


def _blamed(stall: Stall, attempts: Mapping[LeaseKey, Attempt]) -> dict[LeaseKey, Attempt]:
    """
    The attempt whose code blocks the loop; if that is unknown, all whose code might. Unpunished,
    it might block one worker after another, without end.
    """
    if stall.context is not None:
        key = (stall.context.task_id, stall.context.lease_id)
        return {key: attempts[key]} if key in attempts else {}
    return {key: attempt for key, attempt in attempts.items() if attempt.is_on_loop}


def _what_it_did(seconds: float, blamed: int) -> str:
    who = "The handler" if blamed == 1 else f"One of {blamed} handlers, this or another,"
    return (
        f"{who} blocked the event loop of its worker for {seconds:.0f} s; the worker had to end. "
        "Code that waits without `await`, or computes for long, belongs in a `def` handler or in "
        'one with isolation="process".'
    )


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
    # also knows that of the code that waits for the task, which is of the same attempt or of none.
    if task is None:
        return None
    contexts = [c for c in gc.get_referents(task) if isinstance(c, contextvars.Context)]
    attempts = {id(found): found for c in contexts if (found := c.get(CURRENT)) is not None}
    return next(iter(attempts.values())) if len(attempts) == 1 else None
