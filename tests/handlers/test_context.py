"""
What a handler may see of its attempt and ask of its worker.
"""

import asyncio
import datetime
import logging
from collections.abc import Callable
from typing import Any

import pytest

from asyncflow.domain.outcome import Completed, Failed
from asyncflow.handlers import Context, Progress, current_context, load_handlers
from asyncflow.handlers.calls import call_async
from tests.support.builders import a_claim


def a_context(
    *, timeout_seconds: float = 60.0, on_progress: Callable[[Progress], None] | None = None
) -> Context:
    """
    The context of a second attempt.
    """
    claim = a_claim(name="sample", attempt=2, timeout_seconds=timeout_seconds)
    return Context(claim, on_progress=on_progress)


@pytest.mark.parametrize(
    ("reported", "received"),
    [
        ((), Progress()),
        ((0.5,), Progress(0.5)),
        ((1, "done"), Progress(1.0, "done")),
        ((-3,), Progress(0.0)),
        ((7,), Progress(1.0)),
        ((float("nan"), "?"), Progress(None, "?")),
        ((float("inf"),), Progress(1.0)),
        ((-float("inf"),), Progress(0.0)),
        ((10**400,), Progress(1.0)),
        ((None, "a\0b\ud800"), Progress(None, "a\ufffdb?")),
        ((None, "x" * 501), Progress(None, "x" * 500)),
    ],
)
def test_progress_is_brought_into_range(reported: tuple[Any, ...], received: Progress) -> None:
    """
    Any progress report becomes one that PostgreSQL can store; none fails the task.
    """
    reports: list[Progress] = []

    a_context(on_progress=reports.append).progress(*reported)

    assert [received] == reports


def test_progress_needs_no_listener() -> None:
    """
    Without a listener `progress` does nothing, so a handler's tests can pass a bare context.
    """
    a_context().progress(0.5)


def test_time_runs_out_but_never_below_zero() -> None:
    """
    The deadline has a time zone, and the remaining time ends at zero.
    """
    context = a_context(timeout_seconds=60)

    assert 59 < context.remaining_seconds() <= 60
    assert 59 < (context.deadline - datetime.datetime.now(datetime.UTC)).total_seconds() <= 60
    assert 0.0 == a_context(timeout_seconds=-1).remaining_seconds()


def test_a_request_to_stop_is_seen_once_the_handler_reads_it() -> None:
    """
    `stop_seen` tells the code that runs the attempt whether the handler has seen the request.
    """
    context = a_context()
    context.raise_if_cancelled()
    context.ask_to_stop()

    assert not context.stop_seen
    with pytest.raises(asyncio.CancelledError):
        context.raise_if_cancelled()
    assert context.stop_seen


def test_outside_of_a_handler_there_is_no_current_context() -> None:
    """
    Outside a handler `current_context` raises an error that says where it can be called.
    """
    with pytest.raises(LookupError, match="inside handlers only"):
        current_context()


async def test_the_sample_task_takes_the_seconds_it_is_given() -> None:
    """
    The sample task runs for the requested seconds, reports progress, and returns a summary.
    """
    reports: list[Progress] = []
    (sample,) = [h for h in load_handlers([]) if h.name == "sample-task"]

    outcome = await call_async(
        sample, '{"seconds": 0.02}', a_context(on_progress=reports.append), result_bytes_max=1_000
    )

    assert Completed('{"message":"Processed for 0.02 seconds.","seconds":0.02}') == outcome
    assert [0.0, 0.5] == [reports[0].fraction, reports[10].fraction]


@pytest.mark.parametrize("seconds", ["-1", "3600.1", '"long"', "null"])
async def test_the_sample_task_refuses_other_payloads(seconds: str) -> None:
    """
    Only 0 to 3600 seconds are valid.
    """
    (sample,) = [h for h in load_handlers([]) if h.name == "sample-task"]

    outcome = await call_async(
        sample, f'{{"seconds": {seconds}}}', a_context(), result_bytes_max=1_000
    )

    assert isinstance(outcome, Failed)
    assert "InvalidPayload" == outcome.failure.kind


def test_what_a_line_carries_can_be_handed_to_logging() -> None:
    """
    `logging` refuses fields that are attributes of its own records, such as `name`.
    """
    logging.getLogger("shop").warning("sold out", extra=a_context().log_fields())
