"""
A PgBouncer for the tests, in front of one of their PostgreSQL servers.

By default it pools transactions, with few enough sessions that clients must share them. It ends
with the test run, however that happens.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from asyncflow.embedded.account import launcher_for
from tests.support import scratch
from tests.support.node import wait_until
from tests.support.ports import free_port
from tests.support.postgres import PostgresServer

PACKAGE = "pgbouncer"
START_SECONDS_MAX = 20.0

WHAT_WOULD_HELP = "install it (`apt-get install pgbouncer`, `brew install pgbouncer`)"

SESSIONS = 4
SETTINGS = {
    "pool_mode": "transaction",
    "default_pool_size": str(SESSIONS),
    "max_client_conn": "500",
    # Any client may connect, as the server's superuser: it listens on 127.0.0.1 only.
    "auth_type": "any",
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
}

# A process next to it reads our pipe and kills the whole group when the pipe closes.
GUARD = """
    "$@" &
    read -r _
    kill -KILL 0
"""


class Pooler:
    """
    A PgBouncer that a test may kill and start.
    """

    def __init__(self, server: PostgresServer, program: Path, settings: Mapping[str, str]) -> None:
        [socket_folder] = parse_qs(urlsplit(server.cluster.url).query)["host"]
        self._port = free_port()
        self._folder = scratch.make_folder("pgbouncer", in_memory=False)
        self._launcher = launcher_for(self._folder, program)
        configuration = self._folder / "pgbouncer.ini"
        lines = ["[databases]", f"* = host={socket_folder} user=postgres", "[pgbouncer]"]
        lines += [f"{name} = {value}" for name, value in settings.items()]
        configuration.write_text("\n".join([*lines, f"listen_port = {self._port}\n"]))
        self._command = [str(program), str(configuration)]
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database_url: str) -> str:
        """
        The DSN of a database of its server, through the pooler.
        """
        return f"postgresql://anyone@127.0.0.1:{self._port}{urlsplit(database_url).path}"

    def start(self) -> None:
        """
        Start it, on the same port every time, and return when it accepts connections.
        """
        with self._log_file.open("ab") as log:
            self._process = self._launcher.popen(
                ["sh", "-c", GUARD, "sh", *self._command],
                environment=os.environ,
                stdin=subprocess.PIPE,
                output=log,
            )
        try:
            wait_until(self._answers, START_SECONDS_MAX, "PgBouncer did not start")
        except RuntimeError as error:
            raise RuntimeError(f"{error}:\n{self._log_file.read_text()[-2000:]}") from None

    def kill(self) -> None:
        """
        Kill it as a crash would, and wait until it has ended.
        """
        process, self._process = self._process, None
        if process is not None:
            process.communicate()
            wait_until(lambda: not self._answers(), START_SECONDS_MAX, "PgBouncer did not end")

    def close(self) -> None:
        """
        Stop it permanently.
        """
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _log_file(self) -> Path:
        return self._folder / "pgbouncer.log"

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True


@contextmanager
def running_pooler(
    server: PostgresServer, *, settings: Mapping[str, str] | None = None
) -> Iterator[Pooler]:
    """
    Run a PgBouncer until the end of the block, or skip the test if it is not installed.

    Args:
        settings: In addition to `SETTINGS`, or overriding them.
    """
    program = _program()
    if program is None:
        pytest.skip(missing()[0])
    pooler = Pooler(server, program, {**SETTINGS, **(settings or {})})
    try:
        pooler.start()
        yield pooler
    finally:
        pooler.close()


def missing() -> list[str]:
    """
    What to install if this machine lacks it; empty if it has it.
    """
    return [] if _program() else [f"There is no PgBouncer here: {WHAT_WOULD_HELP}."]


def _program() -> Path | None:
    # Debian installs it in a folder that is only on root's PATH.
    found = shutil.which(PACKAGE, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    return Path(found) if found else None
