"""
A live API for tests: a separate process with uvicorn and uvloop, real sockets and a real
PostgreSQL.

Most tests of the API call the application in their own process, which is faster; these are for
requests that no client library would send.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.support.ports import free_port

PATIENCE_SECONDS = 100.0  # Catches a hang; generous enough for a slow machine.
JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    """
    One HTTP response.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        """
        The parsed body.
        """
        return json.loads(self.content)


class LiveApi:
    """
    A running API; made by `live_api`.

    Attributes:
        lines: The log lines so far, oldest first.
        noise: All other output.
    """

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.port = port
        self.lines: list[dict[str, Any]] = []
        self.noise = ""
        self._process = process
        self._started = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def url(self) -> str:
        """
        The base URL.
        """
        return f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """
        How many client sockets the process has open, in any state.
        """
        held = psutil.Process(self._process.pid).net_connections("tcp")
        return sum(c.laddr.port == self.port and c.status != psutil.CONN_LISTEN for c in held)

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON
    ) -> Answer:
        """
        Send one request on a new connection.
        """
        with closing(
            HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        ) as connection:
            connection.request(method, path, body, dict(headers))
            response = connection.getresponse()
            told = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, told, response.read())

    def exchange(self, sent: bytes, *, then_close: bool = False) -> bytes:
        """
        Send bytes on a new connection and read until the server closes it.

        Args:
            then_close: Half-close the connection after sending.
        """
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(sent)
            if then_close:
                connection.shutdown(socket.SHUT_WR)
            received = b""
            try:
                while chunk := connection.recv(65_536):
                    received += chunk
            except ConnectionResetError:
                pass  # The server closed without having read everything.
        return received

    def wait_until_started(self) -> None:
        """
        Wait until it listens.
        """
        started = self._started.wait(PATIENCE_SECONDS)
        assert started and self._process.poll() is None, self.noise

    def stop(self) -> int:
        """
        Stop it and return its exit status.
        """
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(PATIENCE_SECONDS)
        self._listener.join(PATIENCE_SECONDS)
        return status

    def end(self) -> None:
        """
        Kill it, if it is still running.
        """
        self._process.kill()
        self._process.wait()
        self._listener.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            try:
                line = json.loads(text)
            except ValueError:
                self.noise += text
                continue
            self.lines.append(line)
            if line["event"] == "process.started":
                self._started.set()
        self._started.set()


@contextmanager
def live_api(
    database_url: str, folder: Path, *, prelude: str = "", **settings: object
) -> Iterator[LiveApi]:
    """
    Run an API for one block; it must exit with 0 and without having logged an error.

    Args:
        prelude: Python code that its process runs first.
        settings: By the names of `Settings`.
    """
    port = free_port()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("ASYNCFLOW_")}
    given = {
        "database_url": database_url,
        "api_port": port,
        "api_hosts": "api",
        "log_format": "json",
        **settings,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", f"{prelude}\nfrom asyncflow.cli import main\nmain()", "api"],
        cwd=folder,
        env={**inherited, **{f"ASYNCFLOW_{k.upper()}": str(v) for k, v in given.items()}},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    api = LiveApi(process, port)
    try:
        api.wait_until_started()
        yield api
        assert 0 == api.stop(), api.noise
        assert not [line for line in api.lines if line["level"] == "error"]
    finally:
        api.end()
