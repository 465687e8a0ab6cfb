"""
Reverse proxies for the tests, in front of an API: nginx and HAProxy as packaged by Debian.

Each logs one line per request that it saw, whatever the outcome. It ends with the test run, however
that happens.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import scratch
from tests.support.node import wait_until
from tests.support.ports import free_port

PACKAGES = ("nginx", "haproxy")
START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 60.0

# A process next to it reads our pipe and kills the whole group when the pipe closes.
GUARD = """
    "$@" &
    proxy=$!
    read -r signal
    [ -z "$signal" ] || { kill -s "$signal" $proxy; wait $proxy; }
    kill -KILL 0
"""

# Usual settings, which keep connections to the API open, so that the rest of one request would
# become the beginning of the next. Bodies are forwarded as they arrive.
NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    log_format asked '$remote_addr $status $request_uri';
    access_log {folder}/access.log asked;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    upstream api {{ server 127.0.0.1:{api_port}; keepalive 1; }}
    server {{
        listen 127.0.0.1:{port};
        server_name api;
        proxy_http_version 1.1;
        proxy_set_header Host $host;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection $connection_upgrade;
        proxy_request_buffering off;
        proxy_ignore_client_abort on;
        location / {{ proxy_pass http://api; }}
    }}
}}
"""
HAPROXY = """
global
    log stdout format raw local0
defaults
    mode http
    log global
    log-format "%ci %ST %HU"
    option http-keep-alive
    http-reuse always
    timeout connect 10s
    timeout client 60s
    timeout server 60s
frontend clients
    bind 127.0.0.1:{port}
    default_backend api
backend api
    server api 127.0.0.1:{api_port}
"""


class Logged(NamedTuple):
    """
    A request as the proxy saw it, and the status of its answer.
    """

    status: int
    path: str


class Proxy:
    """
    A proxy in front of an API; made by `running_proxy`.
    """

    def __init__(self, name: str, program: Path, *, api_port: int) -> None:
        self.name = name
        self.port = free_port()
        self._folder = scratch.make_folder(name, in_memory=False)
        configuration = self._folder / f"{name}.conf"
        template, start, self._stop_signal = {
            "nginx": (NGINX, ["-c"], b"QUIT\n"),
            "haproxy": (HAPROXY, ["-db", "-f"], b"USR1\n"),
        }[name]
        configuration.write_text(
            template.format(folder=self._folder, port=self.port, api_port=api_port)
        )
        self._command = [str(program), *start, str(configuration)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """
        Start it and return when it accepts connections.
        """
        with (self._folder / "output.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", GUARD, "sh", *self._command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, START_SECONDS_MAX, f"{self.name} did not start")
        except RuntimeError as error:
            raise RuntimeError(f"{error}:\n{self._output[-2000:]}") from None

    def logged(self) -> Mapping[str, list[Logged]]:
        """
        Stop it gracefully, and return the requests that it saw, by client address.
        """
        self._end(self._stop_signal)
        access_log = self._folder / "access.log"
        text = access_log.read_text() if access_log.exists() else self._output
        told: dict[str, list[Logged]] = {}
        for line in text.splitlines():
            address, _, rest = line.partition(" ")
            status, _, path = rest.partition(" ")
            if status.isdigit():
                told.setdefault(address, []).append(Logged(int(status), path))
        return told

    def close(self) -> None:
        """
        Kill it.
        """
        self._end(b"")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, signal: bytes) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.communicate(signal, timeout=STOP_SECONDS_MAX)

    @property
    def _output(self) -> str:
        return (self._folder / "output.log").read_text()

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


@contextmanager
def running_proxy(name: str, *, api_port: int) -> Iterator[Proxy]:
    """
    Run a proxy until the end of the block, or skip the test if it is not installed.
    """
    program = _program(name)
    if program is None:
        pytest.skip(_lack(name))
    proxy = Proxy(name, program, api_port=api_port)
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.close()


def missing_packages() -> list[str]:
    """
    The packages of the proxies that are not installed.
    """
    return [name for name in PACKAGES if _program(name) is None]


def _lack(name: str) -> str:
    return f"There is no {name} here: install it (`apt-get install {name}`, `brew install {name}`)."


def _program(name: str) -> Path | None:
    # Debian installs them in a folder that is only on root's PATH.
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    return Path(found) if found else None
