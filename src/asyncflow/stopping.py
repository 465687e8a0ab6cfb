"""
How a process of ours is told to stop, and how it ends.

Signals count only in the process that they were sent to. Python notes them on a descriptor that
wakes the event loop, and a forked child may share that; so what an event loop reads there, which
is how `add_signal_handler` works, may be meant for another process. A handler of Python's own
runs where the signal arrived.

However a process ends, it ends by `end`: nothing that it still runs may keep it.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from asyncflow.telemetry import events

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

ECHO_SECONDS = 0.5
"""Signals that follow one another faster are one wish: a terminal or a service manager signals a
whole group of processes, and a parent in it passes on what it got."""

CHECK_SECONDS = 0.5
BLOCKED_SECONDS, BLOCKED_COUNT = 0.6, 6
END_SECONDS = 0.4
"""How long functions of `atexit` may take, and everything else between the decision to end and
the end."""


_ending = threading.Event()


def _nothing() -> None:
    pass


def end(status: int, finish: Callable[[], object] = _nothing) -> NoReturn:
    """
    End this process: run `finish` and what is registered with `atexit`, write what is buffered,
    and go.

    Within `END_SECONDS`, whatever threads, executors, tasks and children of `multiprocessing`
    are still there; those children are killed. Nobody is asked to stop, that was before.
    """
    _ending.set()
    if end_at_latest(status):
        # A stream may be closed, replaced, or without a reader.
        streams = [getattr(stream, "flush", _nothing) for stream in (sys.stdout, sys.stderr)]
        for step in (finish, atexit._run_exitfuncs, *streams):
            with contextlib.suppress(BaseException):
                step()
    _leave(status)


def end_at_latest(status: int) -> bool:
    """
    End this process in `END_SECONDS`, whatever it does until then.

    Returns:
        Whether the system had a thread for that.
    """

    def watch() -> None:
        time.sleep(END_SECONDS)
        _leave(status)

    try:
        threading.Thread(target=watch, daemon=True, name="end").start()
    except RuntimeError:  # the system has no thread left
        return False
    return True


def _leave(status: int) -> NoReturn:
    multiprocessing = sys.modules.get("multiprocessing")
    if multiprocessing is not None:
        # They are part of attempts, and would run on beside those that replace them.
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
    os._exit(status)


def end_on_signals() -> None:
    """
    Until somebody asks for `signals`: end at once and well, since nothing was begun.

    The default would end the process with another status, and the first process of a container
    not at all.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _end_well)


def _end_well(number: int, frame: FrameType | None) -> None:
    if not _ending.is_set():
        end(0)


class Signals:
    """
    The signals of one process, by `signals`.
    """

    def __init__(
        self,
        receive: Callable[[signal.Signals], object],
        *,
        numbers: Sequence[signal.Signals] = STOP_SIGNALS,
        grace_seconds: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._receive = receive
        self._numbers = numbers
        self._grace_seconds = grace_seconds
        self._now = now
        self._passed_on_at = -math.inf
        self._former = {number: signal.getsignal(number) for number in numbers}
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """
        A signal came: have it received on the event loop, unless it is the echo of one.
        """
        is_first, now = self._passed_on_at == -math.inf, self._now()
        if now - self._passed_on_at < ECHO_SECONDS:
            return
        self._passed_on_at = now
        with contextlib.suppress(RuntimeError):  # the loop is closed, or there is no thread left
            self._loop.call_soon_threadsafe(self._receive, signal.Signals(number))
            if is_first and self._grace_seconds is not None:
                threading.Thread(target=self._end_if_blocked, daemon=True, name="grace").start()

    def _end_if_blocked(self) -> None:
        """
        When the grace period is over, end the process if its event loop stands still.

        Somebody blocks it, and may do so for ever; what the loop was to do cannot be done.
        """
        assert self._grace_seconds is not None
        time.sleep(self._grace_seconds)
        answered = threading.Event()
        answered.set()
        unanswered = 0
        while True:
            if answered.is_set():
                answered.clear()
                unanswered = 0
                try:
                    self._loop.call_soon_threadsafe(answered.set)
                except RuntimeError:
                    return  # closed
            # Counted, not measured: if the whole process stood still, its loop is not to blame.
            time.sleep(BLOCKED_SECONDS / BLOCKED_COUNT)
            unanswered += 1
            if unanswered > BLOCKED_COUNT:
                end_at_latest(0)
                events.process_blocked()
                _leave(0)

    def take(self) -> None:
        """
        Handle the signals from now on, and take them back from whoever else does.

        A handler or a library may handle them itself, by `signal.signal` or the event loop. The
        process would be deaf from then on.
        """
        taken = [number for number in self._numbers if signal.getsignal(number) != self.handle]
        for number in taken:
            signal.signal(number, self.handle)
        if taken and self._timer is not None:
            events.signals_retaken(signals=",".join(number.name for number in taken))
        self._timer = self._loop.call_later(CHECK_SECONDS, self.take)

    def give_back(self) -> None:
        """
        Leave the signals to who handled them before.
        """
        if self._timer is not None:
            self._timer.cancel()
        for number, former in self._former.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)


@contextmanager
def signals(
    receive: Callable[[signal.Signals], object],
    *,
    numbers: Sequence[signal.Signals] = STOP_SIGNALS,
    grace_seconds: float | None = None,
) -> Iterator[Signals]:
    """
    Have `receive` called on the running event loop for each signal that asks to stop.

    Args:
        grace_seconds: After the first one, how long the event loop may be blocked before the
            process ends all the same; None is for ever.
    """
    handled = Signals(receive, numbers=numbers, grace_seconds=grace_seconds)
    handled.take()
    try:
        yield handled
    finally:
        handled.give_back()
