"""
The process that child processes come from: `python -m asyncflow.worker.isolation.nursery_process`.

A worker starts one nursery and has it load the modules of handlers, once, as the worker itself
does. From then on every child is forked from it: it is up within milliseconds, imports
nothing, and runs the code that was loaded at the worker's start, whatever has been edited
since.

A copy of a process lacks its threads and shares its connections. So where an import started
threads or opened sockets, and on systems whose libraries do not survive a fork, children are
started afresh and import by themselves; a child that finds other files than the nursery found
refuses, so that no worker runs two versions of one handler.

The nursery is the parent of all children and runs no handler itself, so nothing that one does
keeps it from its duties: it says how each child died, and when the worker is gone it kills
them all, programs that handlers started included. If it did not exist, a killed worker would
leave its tasks running while others run them again. If it dies itself, its children die with
it (Linux), or are killed by the worker.

The words are those of `protocol`; what a child does is in `child_process`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import select
import signal
import socket
import stat
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from asyncflow.errors import HandlerError
from asyncflow.handlers.loading import load_handlers
from asyncflow.handlers.registry import Registry
from asyncflow.telemetry.logs import configure_logs
from asyncflow.telemetry.streams import guard_standard_streams
from asyncflow.worker.isolation.child_process import (
    Server,
    die_with_parent,
    leave_signals_to_worker,
    let_forks_take_signals,
    signal_at_death_of_parent,
)
from asyncflow.worker.isolation.protocol import Message, Reader, receive_one, write

MODULE = "asyncflow.worker.isolation.nursery_process"
EXIT_SECONDS = 2
"""How long functions registered with `atexit` by modules of handlers may take."""

SOCKETS_MAX = 16
"""Received in one call."""

Files = Mapping[str, Sequence[int]]
"""When each was changed, in nanoseconds, and its size."""


def main() -> None:
    """
    Be a nursery at the end `sys.argv[1]` of a connection to the worker; or, if `sys.argv[2]` is
    a nursery's process id, a child that has to import by itself.
    """
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # a program that a handler starts must not hold it open
    leave_signals_to_worker()
    if len(sys.argv) > 2:
        _begin_as_child(int(sys.argv[2]))
        _load(connection)
        leave_signals_to_worker()  # what was loaded may have taken them
        _serve(connection)
    else:
        nursery = _nursery(connection)
        own_connection = nursery.run()
        if own_connection is not None:
            _serve(own_connection)


def _nursery(control: socket.socket) -> NurseryProcess:
    worker_pid, sockets = os.getppid(), _sockets()
    signal_at_death_of_parent(signal.SIGKILL)
    files = _load(control)
    leave_signals_to_worker()
    nursery = NurseryProcess(control, worker_pid, forks=_may_fork(sockets))
    nursery.tell_loaded(files)
    return nursery


def _serve(connection: socket.socket) -> None:
    connection.sendall(write({"tell": "ready"}))
    Server(connection).serve()


class NurseryProcess:
    """
    Starts children, kills them and reports their deaths.
    """

    def __init__(self, control: socket.socket, worker_pid: int, *, forks: bool) -> None:
        self._control = control
        self._forks = forks
        self._pid = os.getpid()
        self._pids: dict[int, int] = {}
        self._sockets: list[int] = []
        self._reader = Reader()
        self._worker_pid = worker_pid
        self._woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._waker = waker
        # A process that a handler forked in the worker may hold the connection open.
        signal_at_death_of_parent(signal.SIGCHLD)

    def tell_loaded(self, files: Files) -> None:
        """
        Say what was loaded, and from which files.
        """
        gc.collect()
        gc.freeze()  # or the children's collectors would copy every page
        self._tell({"tell": "loaded", "forks": self._forks, "files": files})

    def run(self) -> socket.socket | None:
        """
        Serve the worker until it is gone; then return None. In a forked child it returns too,
        with the child's connection to the worker.
        """
        poll = select.poll()
        for descriptor in (self._control.fileno(), self._woken):
            poll.register(descriptor, select.POLLIN)
        while True:
            readable = {descriptor for descriptor, _ in poll.poll()}
            if self._woken in readable:
                os.read(self._woken, 4096)
                self._bury_the_dead()
                if os.getppid() != self._worker_pid:
                    self._end()
                    return None
            if self._control.fileno() in readable:
                data, sockets, _, _ = socket.recv_fds(self._control, 1 << 16, SOCKETS_MAX)
                self._sockets += sockets
                if not data:
                    self._end()
                    return None
                for message in self._reader.feed(data):
                    child = self._obey(message)
                    if child is not None:
                        return child

    def _obey(self, message: Message) -> socket.socket | None:
        number: int = message["number"]
        if message["do"] == "kill":
            if number in self._pids:
                _kill(self._pids[number])
            return None
        try:
            return self._start(number)
        except OSError as error:
            self._tell({"tell": "not_started", "number": number, "reason": str(error)})
            return None

    def _start(self, number: int) -> socket.socket | None:
        # One socket comes with each request, unless no descriptor was free for it.
        if not self._sockets:
            raise OSError("No file descriptor is free for its connection.")
        theirs = socket.socket(fileno=self._sockets.pop(0))
        with theirs:
            pid = _fork() if self._forks else _spawn(theirs)
            if pid == 0:
                return self._in_child(theirs)
        self._pids[number] = pid
        self._tell({"tell": "started", "number": number, "pid": pid})
        return None

    def _in_child(self, theirs: socket.socket) -> socket.socket:
        try:
            return self._become_child(theirs)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # never back into the nursery's loop

    def _become_child(self, theirs: socket.socket) -> socket.socket:
        _begin_as_child(self._pid)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._control.close()
        for descriptor in (self._woken, self._waker, *self._sockets):
            os.close(descriptor)
        # What modules registered while they were imported is the nursery's to do, once: it may
        # remove files that all children use.
        atexit._clear()
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()  # as Python does for its own `random`
        return socket.socket(fileno=theirs.detach())

    def _bury_the_dead(self) -> None:
        for number, pid in tuple(self._pids.items()):
            try:
                found, status = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                found, status = pid, signal.SIGKILL  # a user's code waited for it
            if found:
                del self._pids[number]
                _kill_group(pid)  # which keeps its id until the last of it is gone
                code = os.waitstatus_to_exitcode(status)
                self._tell({"tell": "died", "number": number, "status": code})

    def _end(self) -> None:
        for pid in self._pids.values():
            _kill(pid)
        # Python goes on to what modules registered for the exit, and would wait for their threads.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)

    def _tell(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # the worker is gone, which reading tells next
            self._control.sendall(write(message))


def _begin_as_child(nursery_pid: int) -> None:
    os.setsid()
    die_with_parent(nursery_pid)
    let_forks_take_signals()


def _fork() -> int:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed or replaced by what was imported
            stream.flush()  # else the child would write it again
    return os.fork()


def _spawn(connection: socket.socket) -> int:
    connection.set_inheritable(True)
    command = [sys.executable, "-P", "-m", MODULE, str(connection.fileno()), str(os.getpid())]
    return os.posix_spawn(sys.executable, command, os.environ)


def _kill(pid: int) -> None:
    # Itself, too: it may not have made its group yet. It is not buried, so its id is its own.
    with contextlib.suppress(ProcessLookupError):  # unless a user's code waited for it
        os.kill(pid, signal.SIGKILL)
    _kill_group(pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # EPERM: macOS, only zombies
        os.killpg(pid, signal.SIGKILL)


def _load(connection: socket.socket) -> Files:
    """
    Do what the first message says: load the modules that the worker has loaded.

    Exits when it cannot; the worker is told why.

    Returns:
        The files that the worker's handlers come from.
    """
    request = receive_one(connection)
    if request is None:
        sys.exit()
    sys.path[:] = request["path"]
    guard_standard_streams()
    if request["logs"] is not None:
        configure_logs(**request["logs"], process="child")

    def on_module(name: str) -> None:
        connection.sendall(write({"tell": "loading", "module": name}))

    files: Files = request["files"] or {}
    try:
        _check_unchanged(files)
        registry = load_handlers(request["modules"], on_module=on_module)
        _check_unchanged(files)
        _check_complete(registry, request["handlers"])
    except HandlerError as error:
        connection.sendall(write({"tell": "refused", "reason": str(error)}))
        sys.exit()
    return files or _files()


def _check_complete(registry: Registry, wanted: Sequence[str]) -> None:
    missing = sorted(set(wanted) - set(registry.names))
    if missing:
        raise HandlerError(
            f"Handlers that the worker has loaded are missing in its child process: "
            f"{', '.join(missing)}. What a module declares must not depend on the process."
        )


def _files() -> Files:
    found = {}
    for module in tuple(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str):
            with contextlib.suppress(OSError):
                found[file] = _version(file)
    return found


def _check_unchanged(files: Files) -> None:
    for file, version in files.items():
        try:
            is_same = _version(file) == list(version)
        except OSError:
            is_same = False
        if not is_same:
            raise HandlerError(f"{file} has changed since the worker started; restart the worker.")


def _version(file: str) -> list[int]:
    status = os.stat(file)
    return [status.st_mtime_ns, status.st_size]


def _may_fork(sockets_before: set[str]) -> bool:
    """
    Whether a copy of this process would be whole.
    """
    if sys.platform != "linux":
        return False
    try:
        threads = len(os.listdir("/proc/self/task"))
    except OSError:
        return False
    return threads == 1 and _sockets() <= sockets_before


def _sockets() -> set[str]:
    found = set()
    for descriptor in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(descriptor.stat().st_mode):
                found.add(str(descriptor.readlink()))
    return found


if __name__ == "__main__":
    main()
