"""
The contents of log lines, and when and how they leave the process.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
import structlog

from asyncflow.handlers import context as context_module
from asyncflow.handlers.context import CURRENT, Context
from asyncflow.telemetry import events, logs
from asyncflow.telemetry.logs import configure_logs
from asyncflow.telemetry.streams import WRITE_BYTES_MAX
from tests.support.builders import a_claim

PATIENCE_SECONDS = 30.0
TASK_ID = UUID("0192f0c1-2345-7789-8abc-def012345678")


class Stream(io.StringIO):
    """
    Standard error that remembers the text of each write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        """
        Record one write.
        """
        self.writes.append(text)
        return len(text)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """
        The lines written so far.
        """
        return [json.loads(line) for line in "".join(self.writes).splitlines()]


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """
    A stream that receives a worker's log lines; logging is restored afterwards.
    """
    stream = Stream()
    handlers, level = logging.root.handlers[:], logging.root.level
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logs, "log", logs.Log())
    monkeypatch.setattr(events, "log", logs.log)
    monkeypatch.setattr(context_module, "log", logs.log)
    monkeypatch.setattr(logging.root, "handlers", [])
    structlog.reset_defaults()
    configure_logs(level="info", log_format="json", process="worker")
    yield stream
    structlog.reset_defaults()
    logging.root.setLevel(level)
    logging.root.handlers[:] = handlers


def settle(number: int = 1, outcome: str = "completed") -> None:
    """
    Log the end of an attempt.
    """
    events.attempt_settled(
        task_id=TASK_ID,
        name='ship "it"',
        queue="default",
        tenant_id=1,
        attempt=number,
        outcome=outcome,
        run_seconds=0.123456,
        failure=None,
        retry_seconds=None,
    )


def test_an_event_is_one_json_object(stream: Stream) -> None:
    """
    The fields of the event come first, then those common to all lines.
    """
    settle()

    (line,) = stream.lines
    assert [
        *("task_id", "name", "queue", "tenant", "attempt", "outcome", "run_seconds"),
        *("event", "process", "level", "timestamp"),
    ] == list(line)
    assert (str(TASK_ID), 'ship "it"', 0.1235) == (
        line["task_id"],
        line["name"],
        line["run_seconds"],
    )
    assert ("attempt.settled", "worker", "info") == (line["event"], line["process"], line["level"])


def test_the_line_of_a_completed_attempt_has_the_shape_of_all_others(stream: Stream) -> None:
    """
    The line of a completed attempt, which a faster encoder writes, has the same keys as any other.
    """
    settle(1, outcome="completed")
    settle(1, outcome="released")

    complete, release = stream.lines
    assert list(complete) == list(release)
    assert complete | {"outcome": "released", "timestamp": release["timestamp"]} == release


def test_an_event_without_fields_is_a_line_too(stream: Stream) -> None:
    """
    An event without fields is a line with only the common ones.
    """
    events.process_stopped()

    assert ["event", "process", "level", "timestamp"] == list(stream.lines[0])


async def test_the_lines_of_one_turn_of_the_loop_leave_together(stream: Stream) -> None:
    """
    The lines are written in order, in one write, at the end of the turn.
    """
    for number in range(5):
        settle(number)
    assert [] == stream.writes
    await asyncio.sleep(0)

    assert 1 == len(stream.writes)
    assert list(range(5)) == [line["attempt"] for line in stream.lines]


async def test_a_write_is_never_too_large_for_a_pipe_to_keep_it_whole(stream: Stream) -> None:
    """
    No write exceeds the size that a pipe keeps whole, because several processes may share standard
    error.
    """
    for number in range(100):
        settle(number)
    await asyncio.sleep(0)

    assert list(range(100)) == [line["attempt"] for line in stream.lines]
    assert 1 < len(stream.writes) < 20
    assert all(len(text) <= WRITE_BYTES_MAX and text.endswith("}\n") for text in stream.writes)


async def test_a_line_longer_than_that_goes_alone(stream: Stream) -> None:
    """
    A line above that size is written by itself, in full.
    """
    settle()
    events.chore_failed(chore="reaper", reason="x" * 2 * WRITE_BYTES_MAX)

    assert 2 == len(stream.writes)
    assert 2 == len(stream.lines)


async def test_a_warning_does_not_wait_nor_does_what_came_before_it(stream: Stream) -> None:
    """
    A warning is written immediately, together with the lines before it: the process may be about to
    die.
    """
    settle(1)
    settle(2, outcome="failed")

    assert [(1, "info"), (2, "warning")] == [(ln["attempt"], ln["level"]) for ln in stream.lines]


async def test_a_line_from_another_thread_does_not_wait(stream: Stream) -> None:
    """
    A line from another thread is written immediately: that thread has no event loop to write it
    later.
    """
    await asyncio.to_thread(settle)

    assert 1 == len(stream.lines)


def test_lines_do_not_wait_for_a_loop_that_is_closed(stream: Stream) -> None:
    """
    Lines left over from a closed event loop are written by the next one.
    """

    async def report(number: int) -> None:
        settle(number)
        if number == 1:
            asyncio.get_running_loop().stop()  # Before the end of the turn.

    first = asyncio.new_event_loop()
    stopping = first.create_task(report(1))
    first.run_forever()
    assert stopping.done()
    first.close()
    asyncio.run(report(2))

    assert [1, 2] == [line["attempt"] for line in stream.lines]


async def test_a_line_says_when_it_happened_and_not_when_it_was_written(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The timestamp is that of the event, in UTC, to the microsecond.
    """
    monkeypatch.setattr("time.time", lambda: 1_760_000_000.000_25)
    settle()
    monkeypatch.setattr("time.time", lambda: 1_760_000_009.5)
    await asyncio.sleep(0)

    assert "2025-10-09T08:53:20.000250Z" == stream.lines[0]["timestamp"]


def test_what_is_below_the_level_is_not_written(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Lines below the level are dropped; a failed task has a higher level than an attempt that ended.
    """
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logs(level="warning", log_format="json", process="worker")

    settle(1)
    events.process_stopped()
    settle(2, outcome="failed")

    assert [2] == [line["attempt"] for line in stream.lines]


def test_an_error_brings_its_traceback(stream: Stream) -> None:
    """
    The traceback is one string, after all other fields.
    """
    try:
        raise ValueError("no")
    except ValueError as error:
        events.request_failed(incident_id="i", method="GET", path="/", error=error)

    (line,) = stream.lines
    assert "exception" == list(line)[-1]
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: no")


def test_records_of_libraries_have_our_format(stream: Stream) -> None:
    """
    Records of libraries become lines in our format, from WARNING up.
    """
    logging.getLogger("asyncio").info("quiet")
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("asyncio").exception("Task %s died", 7)

    (line,) = stream.lines
    assert ["logger", "event", "process", "level", "timestamp", "exception"] == list(line)
    assert ("Task 7 died", "worker", "error") == (line["event"], line["process"], line["level"])
    assert line["exception"].endswith("ValueError: no")


async def test_a_handlers_line_is_written_immediately(stream: Stream) -> None:
    """
    A handler's line is written immediately, since what it announces may end the process. It
    contains what was bound to the logger and the context.
    """
    logger = logs.log.structlog().bind(task_id="1")
    with structlog.contextvars.bound_contextvars(order=7):
        logger.info("looked", at="stars", process="mine")
    logger.debug("unheard")

    (line,) = stream.lines
    del line["timestamp"]
    ours = {"event": "looked", "level": "info", "process": "worker"}
    assert {"task_id": "1", "order": 7, "at": "stars", "process_": "mine", **ours} == line


async def test_a_handlers_line_may_hold_anything_and_an_exception(stream: Stream) -> None:
    """
    A handler may log any value, and an exception; values that JSON cannot represent are shown by
    their `repr`.
    """
    try:
        raise ValueError("no")
    except ValueError:
        logs.log.structlog().exception("failed", where={1, 2})

    (line,) = stream.lines
    assert ("{1, 2}", "error") == (line["where"], line["level"])
    assert line["exception"].endswith("ValueError: no")


def test_a_handler_modules_structlog_configuration_is_kept(stream: Stream) -> None:
    """
    A handler module's own configuration of structlog is left unchanged.
    """
    heard = []

    def hear(_: Any, __: str, event: Any) -> str:
        heard.append(event["event"])
        raise structlog.DropEvent

    structlog.configure(processors=[hear])

    logs.log.structlog().info("mine")

    assert ["mine"] == heard
    assert [] == stream.lines


@contextmanager
def an_attempt() -> Iterator[Context]:
    """
    Run a block as a handler's code.
    """
    ours = [each for each in logging.root.handlers if type(each).__module__ == logs.__name__]
    logging.root.handlers[:] = ours  # Pytest's handlers cannot print everything.
    context = Context(a_claim(task_id=TASK_ID, name="count", attempt=2))
    token = CURRENT.set(context)
    yield context
    CURRENT.reset(token)


OF_THE_ATTEMPT = {"task_id": str(TASK_ID), "task_name": "count", "attempt": 2}


def test_a_handler_may_log_through_the_standard_module(stream: Stream) -> None:
    """
    The line has the level, the attempt's fields, the logger's name and the contents of `extra`.
    """
    logger = logging.getLogger("billing.tasks")
    with an_attempt():
        logger.debug("unheard")
        logger.info("counted %d rows", 3, extra={"shop": 7, "level": "high"})

    (line,) = stream.lines
    del line["timestamp"]
    theirs = {"logger": "billing.tasks", "shop": 7, "level_": "high"}
    ours = {"event": "counted 3 rows", "level": "info", "process": "worker"}
    assert {**OF_THE_ATTEMPT, **theirs, **ours} == line


def test_a_handler_may_log_through_structlog(stream: Stream) -> None:
    """
    A handler may use its own structlog logger; the line has the attempt's fields.
    """
    logs.log.adopt_structlog()
    with an_attempt():
        structlog.get_logger().warning("low", stock=3)

    (line,) = stream.lines
    assert {**OF_THE_ATTEMPT, "stock": 3, "event": "low"}.items() <= line.items()


def test_lines_of_libraries_outside_of_an_attempt_name_no_task(stream: Stream) -> None:
    """
    A library's line from outside an attempt has no fields of a task.
    """
    logging.getLogger("library").info("loaded")

    (line,) = stream.lines
    assert ["logger", "event", "process", "level", "timestamp"] == list(line)


def test_custom_levels_become_the_next_lower_standard_one(stream: Stream) -> None:
    """
    Custom levels are rounded down to a standard one, since only their library knows their names.
    """
    logging.getLogger("library").log(35, "loud")
    logging.getLogger("library").log(99, "louder")

    assert ["warning", "critical"] == [line["level"] for line in stream.lines]


class Unprintable:
    """
    An object without `repr` and `str`.
    """

    def __repr__(self) -> str:
        raise KeyboardInterrupt

    __str__ = __repr__


class UnprintableError(Exception):
    """
    An error whose text raises.
    """

    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


def circle() -> list[object]:
    """
    A list that contains itself.
    """
    found: list[object] = []
    found.append(found)
    return found


ANYTHING: dict[str, object] = {
    "a key that is a tuple": {("a", 1): 2},
    "a circle": circle(),
    "no repr": Unprintable(),
    "no repr inside": {"a": [Unprintable()]},
    "no number": float("nan"),
    "a surrogate": "caf\udce9",
    "bytes": b"\xff",
}


@pytest.fixture(params=["json", "console"])
def any_stream(
    request: pytest.FixtureRequest, stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> Stream:
    """
    A stream that receives lines in either format.
    """
    structlog.reset_defaults()
    configure_logs(level="info", log_format=request.param, process="worker")
    return stream


@pytest.mark.parametrize("what", ANYTHING)
def test_a_handler_may_log_anything(any_stream: Stream, what: str) -> None:
    """
    Whatever a handler logs, the call does not raise, and the other fields of the line are correct.
    """
    with an_attempt() as context:
        context.logger.info("looked", at="stars", found=ANYTHING[what])
        logging.getLogger("tasks").info("looked", extra={"at": "stars", "found": ANYTHING[what]})
        logging.getLogger("tasks").info("looked at stars %s", ANYTHING[what])
        logging.getLogger("tasks").info("looked at stars %d %d", ANYTHING[what])  # noqa: PLE1206

    lines = "".join(any_stream.writes).splitlines()
    assert 4 == len(lines)
    assert all("looked" in line and "stars" in line and str(TASK_ID) in line for line in lines)


def test_a_line_with_a_field_that_json_cannot_say_is_json(stream: Stream) -> None:
    """
    A field that JSON cannot represent becomes text, and the line stays valid JSON.
    """
    with an_attempt() as context:
        context.logger.info("counts", d={("a", 1): 2}, e=float("inf"), f=Unprintable(), g=7)

    (line,) = stream.lines
    assert ("{('a', 1): 2}", "inf", "(a Unprintable that cannot be printed)", 7) == (
        *(line["d"], line["e"], line["f"], line["g"]),
    )


def test_an_error_that_cannot_be_printed_may_be_logged(any_stream: Stream) -> None:
    """
    An exception whose text raises can be logged through every logger.
    """
    with an_attempt() as context:
        try:
            raise UnprintableError
        except UnprintableError:
            context.logger.exception("failed")
            logging.getLogger("tasks").exception("failed")

    assert 2 == "".join(any_stream.writes).count("UnprintableError: ")


def test_a_stream_that_raises_fails_no_caller(any_stream: Stream) -> None:
    """
    Logging to a closed stream does not raise: a handler may replace standard error and close the
    replacement.
    """
    any_stream.close()
    any_stream.write = io.StringIO.write.__get__(any_stream)  # type: ignore[method-assign]

    with an_attempt() as context:
        context.logger.info("unheard")
        logging.getLogger("tasks").warning("unheard")
    events.process_stopped()


PROGRAM = """
import asyncio, os, sys
from asyncflow.telemetry import events
from asyncflow.telemetry.logs import configure_logs

configure_logs(level="info", log_format="json", process="worker")

async def main():
    events.process_started(number=1)
    {ending}

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("sys.exit(3)", ["process.started"]),
        ("asyncio.get_running_loop().stop()", ["process.started"]),
        # A process forked by a handler, which ends like any program.
        ("os.fork() and os.wait(); sys.exit(3)", ["process.started"]),
        (
            "events.worker_stalled(seconds=1, blamed=[], running=0, stack=''); os._exit(70)",
            ["process.started", "worker.stalled"],
        ),
    ],
)
def test_a_line_is_written_once_however_the_process_ends(ending: str, expected: list[str]) -> None:
    """
    Every line is written exactly once, even if the process ends before the turn of the loop is
    over.
    """
    program = PROGRAM.format(ending=ending)

    ended = subprocess.run(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, check=False
    )

    lines = [line for line in ended.stderr.splitlines() if line.startswith("{")]
    assert expected == [json.loads(line)["event"] for line in lines]


def test_json_lines_need_no_structlog() -> None:
    """
    JSON lines do not import structlog, whose 6 MB an idle worker does not need.
    """
    program = PROGRAM.format(ending='sys.exit("structlog" in sys.modules)')

    assert 0 == subprocess.run([sys.executable, "-c", program], check=False).returncode


def test_a_process_that_runs_no_tasks_says_nothing_of_them(stream: Stream) -> None:
    """
    Only a worker's lines have a number of running attempts.
    """
    events.process_stopping(signal="SIGTERM")
    events.process_stopping(signal="SIGTERM", running=0)

    assert [None, 0] == [line.get("running") for line in stream.lines]
    assert "running" not in stream.lines[0]


BROKEN_STREAMS = """
import os, sys
from asyncflow.telemetry import events
from asyncflow.telemetry.logs import configure_logs
from asyncflow.telemetry.streams import guard_standard_streams

guard_standard_streams()
configure_logs(level="info", log_format="{log_format}", process="worker")
{deed}
print("to standard output")
print("to standard error", file=sys.stderr)
events.process_started(number=1)
events.process_stopping(signal="SIGTERM")
"""


@pytest.mark.parametrize(
    "deed",
    [
        "sys.stdout.close(); sys.stderr.close()",
        "sys.stdout.buffer.close(); sys.stderr.buffer.close()",
        "with sys.stdout, sys.stderr: pass",
        "open(1, 'w', closefd=False).close()",
    ],
)
def test_a_handler_that_closes_a_stream_does_not_close_it_for_others(deed: str) -> None:
    """
    A handler that closes a standard stream does not close it for others, since all handlers share
    it.
    """
    program = BROKEN_STREAMS.format(deed=deed, log_format="json")

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert "to standard output\n" == ended.stdout
    assert "to standard error" == ended.stderr.splitlines()[0]
    assert ["process.started", "process.stopping"] == re.findall(r"process\.\w+", ended.stderr)
    assert 0 == ended.returncode


@pytest.mark.parametrize(
    "deed", ["os.close(1); os.close(2)", "sys.stdout = sys.stderr = None", "os.closerange(1, 99)"]
)
def test_a_missing_stream_fails_no_caller(deed: str) -> None:
    """
    Without standard streams a process runs on, and what it writes there is dropped.
    """
    program = BROKEN_STREAMS.format(deed=deed, log_format="json")

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)

    assert 0 == ended.returncode


def test_what_a_handler_printed_is_there_when_the_process_is_killed() -> None:
    """
    What a handler prints is written line by line, even to a pipe, so it survives a kill.
    """
    deed = "print('half', end=' '); print('a line'); os.kill(os.getpid(), 9)"
    program = BROKEN_STREAMS.format(deed=deed, log_format="json")

    ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE)

    assert b"half a line\n" == ended.stdout


UNREAD = """
for number in range(1000):
    print("x" * 100)
    events.process_started(text="x" * 100)
"""


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_process_outlives_a_pipe_that_nobody_reads(log_format: str) -> None:
    """
    Once an unread pipe is full, lines are dropped after at most a second of waiting for room.
    """
    program = BROKEN_STREAMS.format(deed=UNREAD, log_format=log_format)

    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert 0 == process.wait(PATIENCE_SECONDS)
