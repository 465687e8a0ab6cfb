"""
How an AsyncFlow process is asked to stop, and how it ends.

A signal must affect only the process it was sent to. `add_signal_handler` does not ensure that: it
reads signals from a descriptor that wakes the event loop, and a forked child may share this
descriptor with its parent. A handler set with `signal.signal` runs in the process that got the
signal, so these are used here.

Every process ends through `end`, which does not wait for anything that still runs.
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
"""Signals closer together than this count as one: a terminal or a service manager signals a whole
process group, and a parent in that group passes the signal on as well."""

CHECK_SECONDS = 0.5
BLOCKED_SECONDS, BLOCKED_COUNT = 0.6, 6
END_SECONDS = 0.4
"""How long `atexit` functions and everything else may take from the call of `end` to the exit."""


_ending = threading.Event()


def _nothing() -> None:
    pass


def end(status: int, finish: Callable[[], object] = _nothing) -> NoReturn:
    """
    End this process: run `finish` and `atexit` functions, flush the standard streams, and exit.

    This takes at most `END_SECONDS`, whatever threads, executors and tasks still run; children of
    `multiprocessing` are killed. Nothing is asked to stop here; that has been done before.
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
        False if the system had no thread for this.
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
        # They belong to attempts, and would run alongside the attempts that replace those.
        with contextlib.suppress(Exception):
            for child in multiprocessing.active_children():
                child.kill()
    os._exit(status)


def end_on_signals() -> None:
    """
    Exit with status 0 on a signal until `signals` is used: nothing has been started yet.

    By default the process would exit with another status, and as the first process of a
    container it would not exit at all.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, _end_well)


def _end_well(number: int, frame: FrameType | None) -> None:
    if not _ending.is_set():
        end(0)


class Signals:
    """
    The signal handlers of one process, see `signals`.
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
        Pass a signal on to the event loop, unless it repeats the one before.
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
        After the grace period, end the process if its event loop is blocked.

        The block may never end, and nothing that was left to the loop can be done.
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
            # Counted, not measured: a frozen process is not a blocked event loop.
            time.sleep(BLOCKED_SECONDS / BLOCKED_COUNT)
            unanswered += 1
            if unanswered > BLOCKED_COUNT:
                end_at_latest(0)
                events.process_blocked()
                _leave(0)

    def take(self) -> None:
        """
        Handle the signals, and check from time to time that this is still so.

        A task handler or a library may replace the signal handlers, through `signal.signal` or the
        event loop; the process would then ignore a request to stop.
        """
        taken = [number for number in self._numbers if signal.getsignal(number) != self.handle]
        for number in taken:
            signal.signal(number, self.handle)
        if taken and self._timer is not None:
            events.signals_retaken(signals=",".join(number.name for number in taken))
        self._timer = self._loop.call_later(CHECK_SECONDS, self.take)

    def give_back(self) -> None:
        """
        Restore the signal handlers that were set before.
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
    Call `receive` on the running event loop for each signal that asks the process to stop.

    Args:
        grace_seconds: How long after the first signal a blocked event loop is tolerated before
            the process exits anyway; None is no limit.
    """
    handled = Signals(receive, numbers=numbers, grace_seconds=grace_seconds)
    handled.take()
    try:
        yield handled
    finally:
        handled.give_back()
