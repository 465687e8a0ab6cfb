"""
Writing to a standard stream takes a bounded time and never raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from asyncflow.telemetry.streams import WRITE_BYTES_MAX, Outlet, own_stream

ROOM_SECONDS = 0.05
LINE = b"x" * 999 + b"\n"


class Pipe:
    """
    A pipe and its two ends.
    """

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)

    def read(self) -> bytes:
        """
        Everything in the pipe.
        """
        found = b""
        while True:
            try:
                data = os.read(self.reading, 1 << 16)
            except BlockingIOError:
                return found
            found += data

    def fill(self) -> None:
        """
        Fill the pipe.
        """
        os.set_blocking(self.writing, False)
        try:
            while True:
                os.write(self.writing, LINE)
        except BlockingIOError:
            os.set_blocking(self.writing, True)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    """
    A pipe for one test.
    """
    pipe = Pipe()
    yield pipe
    os.close(pipe.reading)
    os.close(pipe.writing)


def report(lost: int) -> str:
    """
    Say how many writes were lost.
    """
    return f"{lost} lost\n"


def test_what_is_written_arrives(pipe: Pipe) -> None:
    """
    All of the data arrives, even more than fits into one write.
    """
    outlet = Outlet(pipe.writing, room_seconds=ROOM_SECONDS)

    assert 5 * WRITE_BYTES_MAX == outlet.write(b"y" * 5 * WRITE_BYTES_MAX)

    assert b"y" * 5 * WRITE_BYTES_MAX == pipe.read()


def test_what_nobody_reads_is_lost_and_counted(pipe: Pipe) -> None:
    """
    With the pipe full, writes are dropped; once there is room again, the reader learns how many.
    """
    outlet = Outlet(pipe.writing, report, room_seconds=ROOM_SECONDS)
    pipe.fill()

    assert [len(LINE)] * 3 == [outlet.write(LINE) for _ in range(3)]
    pipe.read()
    outlet.write(b"heard\n")

    assert b"3 lost\nheard\n" == pipe.read()


def test_only_the_first_write_waits_for_a_reader(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Only the first write waits for room; otherwise a process that logs a lot would do nothing but
    wait.
    """
    waits: list[float] = []

    class Poll:
        def register(self, descriptor: int, events: int) -> None:
            """
            Do nothing.
            """

        def poll(self, milliseconds: float) -> list[object]:
            """
            Report that there is no room.
            """
            waits.append(milliseconds)
            return []

    monkeypatch.setattr("select.poll", Poll)
    outlet = Outlet(pipe.writing, room_seconds=ROOM_SECONDS)
    for _ in range(3):
        outlet.write(LINE)

    assert [50] == [wait for wait in waits if wait]


def test_a_pipe_without_a_reader_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Writing to a pipe whose reader has exited does not raise.
    """
    reading, writing = os.pipe()
    outlet = Outlet(writing)
    os.close(reading)

    assert len(LINE) == outlet.write(LINE)
    os.close(writing)
    assert len(LINE) == outlet.write(LINE)


def test_a_full_disk_raises_nothing() -> None:
    """
    Writing to a full disk does not raise: the work matters more than its logs.
    """
    with open("/dev/full", "wb", buffering=0) as full:
        assert len(LINE) == Outlet(full.fileno()).write(LINE)


def test_our_own_stream_leaves_the_shared_descriptor_blocking(pipe: Pipe) -> None:
    """
    Our stream leaves the descriptor in blocking mode, which other processes share.
    """
    with os.fdopen(os.dup(pipe.writing), "w") as shared:
        own = own_stream(shared, report)
        own.write("a line\n")

    assert os.get_blocking(pipe.writing)
    assert b"a line\n" == pipe.read()
