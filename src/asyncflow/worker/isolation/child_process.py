"""
A child process of a worker, which runs handlers one at a time.

It calls them in its main thread. A second thread listens to the worker, so that a request to
stop arrives while a handler runs; a third passes progress on, so that handlers may report as
often as they like. The words are those of `protocol`. Standard output and error
belong to the handlers. Where children come from is in `nursery_process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from asyncflow.domain.outcome import Outcome
from asyncflow.errors import HandlerError
from asyncflow.handlers.calls import call_async, call_blocking, failed
from asyncflow.handlers.context import Context, Progress
from asyncflow.handlers.registry import DEFAULT_REGISTRY, Handler
from asyncflow.worker.isolation.garbage import Garbage
from asyncflow.worker.isolation.protocol import Message, Reader, read_claim, write, write_outcome

PROGRESS_SECONDS = 0.05
"""Progress leaves at most this often; the latest report wins."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

PR_SET_PDEATHSIG = 1


class Server:
    """
    One connection to the worker, and the attempt that runs now, if any.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._call: Call | None = None
        self._stop_number = 0
        self._stopping = threading.Lock()
        self._progress: Message | None = None
        self._has_progress = threading.Event()
        self._garbage = Garbage()

    def serve(self) -> None:
        """
        Run attempts until the connection closes.
        """
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._pass_progress_on, daemon=True).start()
        while (request := self._requests.get()) is not None:
            self._serve_one(request)

    def report(self, number: int, progress: Progress) -> None:
        """
        Send `progress` when the line is free, unless a later one comes first.
        """
        self._progress = {
            "tell": "progress",
            "number": number,
            "fraction": progress.fraction,
            "message": progress.message,
        }
        self._has_progress.set()

    def _serve_one(self, request: Message) -> None:
        number = request["number"]
        self._send({"tell": "started", "number": number})
        call = Call(request, on_progress=lambda progress: self.report(number, progress))
        with self._stopping:
            self._call = call
            if self._stop_number == number:
                call.stop()
        outcome = call.run()
        with self._stopping:
            self._call = None
        self._has_progress.clear()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the handler may have closed or replaced it
                stream.flush()
        self._send(
            {
                "tell": "ended",
                "number": number,
                "outcome": write_outcome(outcome),
                "stop_seen": call.stop_seen,
            }
        )
        self._garbage.check()

    def _listen(self) -> None:
        reader = Reader()
        with contextlib.suppress(OSError):
            while data := self._connection.recv(1 << 16):
                for message in reader.feed(data):
                    self._receive(message)
        with self._stopping:
            if self._call is not None:
                os.killpg(0, signal.SIGKILL)  # the worker has gone; another may run it
        self._requests.put(None)

    def _receive(self, message: Message) -> None:
        match message["do"]:
            case "run":
                self._requests.put(message)
            case "stop":
                with self._stopping:
                    self._stop_number = message["number"]
                    if self._call is not None and self._call.number == self._stop_number:
                        self._call.stop()

    def _pass_progress_on(self) -> None:
        while self._has_progress.wait():
            self._has_progress.clear()
            if self._progress is not None:
                self._send(self._progress)
            time.sleep(PROGRESS_SECONDS)

    def _send(self, message: Message) -> None:
        data = write(message)
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError:
            os._exit(1)  # the worker has gone, or the handler closed what was not its own


class Call:
    """
    One call of a handler, for one attempt.
    """

    def __init__(self, request: Message, *, on_progress: Callable[[Progress], None]) -> None:
        self.number: int = request["number"]
        self._request = request
        self._context = Context(read_claim(request["claim"]), on_progress=on_progress)
        self._cancel: Callable[[], object] | None = None
        self._is_stopping = False
        self._cancelled_the_task = False

    @property
    def stop_seen(self) -> bool:
        """
        Whether the handler knew that it should stop before it ended.
        """
        return self._cancelled_the_task or self._context.stop_seen

    def stop(self) -> None:
        """
        Ask the handler to stop; from any thread.
        """
        self._is_stopping = True
        self._context.ask_to_stop()
        if self._cancel is not None:
            with contextlib.suppress(RuntimeError):  # its loop has just closed
                self._cancel()

    def run(self) -> Outcome:
        """
        Call the handler; in the main thread.
        """
        try:
            handler = _handler(self._request["handler"])
            if handler.is_async:
                return asyncio.run(self._await(handler))
        except BaseException as error:
            return failed(error)
        arguments = (handler, self._request["payload"], self._context)
        bytes_max = self._request["result_bytes_max"]
        fresh = contextvars.copy_context()
        return fresh.run(call_blocking, *arguments, result_bytes_max=bytes_max)

    async def _await(self, handler: Handler) -> Outcome:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def cancel() -> None:
            if not task.done():
                self._cancelled_the_task = True
                task.cancel()

        self._cancel = lambda: loop.call_soon_threadsafe(cancel)
        if self._is_stopping:
            cancel()
        return await call_async(
            handler,
            self._request["payload"],
            self._context,
            result_bytes_max=self._request["result_bytes_max"],
        )


def _handler(name: str) -> Handler:
    handler = DEFAULT_REGISTRY.get(name)
    if handler is None:
        raise HandlerError(f"This child process has not loaded handler {name!r}.")
    return handler


def die_with_parent(parent_pid: int) -> None:
    """
    Have the kernel, where it can, kill this process when its parent ends.
    """
    signal_at_death_of_parent(signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def signal_at_death_of_parent(number: signal.Signals) -> None:
    """
    Have the kernel, where it can, send this process a signal when its parent ends.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def leave_signals_to_worker() -> None:
    """
    Let signals to stop pass: service managers signal every process of a group, and when to stop
    is for the worker to say.
    """
    # Not SIG_IGN, which programs started by handlers would inherit.
    for number in STOP_SIGNALS:
        signal.signal(number, _ignore)


def let_forks_take_signals() -> None:
    """
    What handlers fork takes signals to stop as any program does.
    """
    # What a handler forks is its own, and multiprocessing ends it by SIGTERM. Python forgets
    # signals that arrive while it forks, so they are held up until they can take effect.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS),
        after_in_child=_take_signals,
    )


def _take_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
