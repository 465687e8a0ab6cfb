"""
The load generator of `bin/bench` for machines without `wrk`.
"""

from __future__ import annotations

import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.http_load import post_for

ANSWER = b"HTTP/1.1 202 Accepted\r\ncontent-length: 2\r\n\r\n{}"


@pytest.fixture(autouse=True)
def no_wrk(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A machine without `wrk`.
    """
    monkeypatch.setattr(shutil, "which", lambda name: None)


@contextmanager
def serving(*, requests_max: int) -> Iterator[str]:
    """
    Run a server that closes each connection after some requests; yields its URL.
    """

    class Answering(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for _ in range(requests_max):
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = self.rfile.readline()
                    if not line:
                        return
                    head += line
                self.rfile.read(2)
                self.wfile.write(ANSWER)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/tasks"
        finally:
            server.shutdown()
            thread.join()


def test_the_load_is_measured_without_wrk() -> None:
    """
    The report counts every response, and names the generator.
    """
    with serving(requests_max=1_000_000) as url:
        answers = post_for(0.2, url, b"{}", connections=2)

    assert "a small Python client" == answers.generator
    assert answers.per_second > 0
    assert 0 == answers.refused


def test_a_server_that_closes_connections_ends_the_measurement() -> None:
    """
    The measurement fails instead of waiting for an answer that never comes.
    """
    with serving(requests_max=3) as url:
        with pytest.raises(subprocess.CalledProcessError):
            post_for(3_600, url, b"{}", connections=2)
