"""
The child process that runs handlers one at a time: `python -m asyncflow.worker.child`.

It is two processes. The one that the worker started, the keeper, only waits: when the worker
is gone it kills the whole process group, programs that handlers started included, and when
the other one dies it passes the manner of its death on. No handler can keep it from that,
neither by holding the interpreter's lock in C nor by taking all the memory. If it did not
exist, a killed worker would leave its tasks running while others run them again.

The other one, the server, calls handlers in its main thread. A second thread listens to the
worker, so that a request to stop arrives while a handler runs; a third passes progress on,
so that handlers may report as often as they like. The words are those of
`worker/child_protocol`. Standard output and error belong to the handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import os
import queue
import resource
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from asyncflow.domain.outcome import Outcome
from asyncflow.errors import HandlerError
from asyncflow.handlers.calls import call_async, call_blocking, failed
from asyncflow.handlers.context import Context, Progress
from asyncflow.handlers.loading import load_module
from asyncflow.handlers.registry import DEFAULT_REGISTRY, Handler
from asyncflow.telemetry.logs import configure_logs
from asyncflow.telemetry.streams import guard_standard_streams
from asyncflow.worker.child_protocol import Message, Reader, read_context, write, write_outcome
from asyncflow.worker.garbage import Garbage

LEAVE_SECONDS = 0.5
"""How long an idle server may take to exit when the worker has gone."""

PROGRESS_SECONDS = 0.05
"""Progress leaves at most this often; the latest report wins."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

PR_SET_PDEATHSIG = 1


def main() -> None:
    """
    Serve the worker at the other end of the socket `sys.argv[1]` until it closes it.
    """
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # a program that a handler starts must not hold it open
    keeper_pid = os.getpid()
    server_pid = os.fork()
    _leave_signals_to_worker()
    if server_pid:
        _keep(connection, server_pid)
    _die_with(keeper_pid)
    Server(connection).serve()


class Server:
    """
    One connection to the worker, and the attempt that runs now, if any.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._attempt: Attempt | None = None
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
            if request["do"] == "prepare":
                _prepare(request)
            else:
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
        attempt = Attempt(request, on_progress=lambda progress: self.report(number, progress))
        with self._stopping:
            self._attempt = attempt
            if self._stop_number == number:
                attempt.stop()
        outcome = attempt.run()
        with self._stopping:
            self._attempt = None
        self._has_progress.clear()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the handler may have closed or replaced it
                stream.flush()
        self._send(
            {
                "tell": "ended",
                "number": number,
                "outcome": write_outcome(outcome),
                "stop_seen": attempt.stop_seen,
            }
        )
        self._garbage.look()

    def _listen(self) -> None:
        reader = Reader()
        with contextlib.suppress(OSError):
            while data := self._connection.recv(1 << 16):
                for message in reader.feed(data):
                    self._receive(message)
        with self._stopping:
            if self._attempt is not None:
                os.killpg(0, signal.SIGKILL)  # nobody waits for it; another worker may run it
        self._requests.put(None)

    def _receive(self, message: Message) -> None:
        match message["do"]:
            case "prepare" | "run":
                self._requests.put(message)
            case "stop":
                with self._stopping:
                    self._stop_number = message["number"]
                    if self._attempt is not None and self._attempt.number == self._stop_number:
                        self._attempt.stop()

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


class Attempt:
    """
    One attempt in this process.
    """

    def __init__(self, request: Message, *, on_progress: Callable[[Progress], None]) -> None:
        self.number: int = request["number"]
        self._request = request
        self._context = Context(**read_context(request["context"]), on_progress=on_progress)
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
            handler = _handler(self._request["module"], self._request["handler"])
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


def _prepare(request: Message) -> None:
    sys.path[:] = request["path"]
    guard_standard_streams()
    if request["logs"] is not None:
        configure_logs(**request["logs"], process="child")


def _handler(module: str, name: str) -> Handler:
    handler = DEFAULT_REGISTRY.get(name)
    if handler is None:
        load_module(module)
        handler = DEFAULT_REGISTRY.get(name)
    if handler is None:
        raise HandlerError(f"Module {module!r} does not declare handler {name!r} when imported.")
    return handler


def _keep(connection: socket.socket, server_pid: int) -> NoReturn:
    threading.Thread(target=_end_with_worker, args=(connection,), daemon=True).start()
    _, status = os.waitpid(server_pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the server has dumped its own
        with contextlib.suppress(OSError):  # SIGKILL cannot be reset and need not be
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _end_with_worker(connection: socket.socket) -> None:
    line = select.poll()
    line.register(connection, 0)  # POLLHUP is reported unasked; data is the server's
    line.poll()
    time.sleep(LEAVE_SECONDS)  # an idle server leaves by itself
    os.killpg(0, signal.SIGKILL)


def _die_with(keeper_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper_pid:
        os._exit(1)


def _leave_signals_to_worker() -> None:
    # Service managers signal every process of a group; when to stop is for the worker to say.
    # Not SIG_IGN, which programs started by handlers would inherit.
    for number in STOP_SIGNALS:
        signal.signal(number, _ignore)
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


if __name__ == "__main__":
    main()
