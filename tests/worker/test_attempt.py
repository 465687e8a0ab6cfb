"""
An attempt always ends with one settlement, or with none because its lease is lost.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from asyncflow.aio.batching import Batcher
from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import Event
from asyncflow.domain.task import Claim
from asyncflow.errors import StoreUnavailable
from asyncflow.store.settle import Settling
from asyncflow.telemetry import events
from asyncflow.telemetry.logs import Log
from asyncflow.worker.attempt import REFUSALS_MAX, Attempt, Tools
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.isolation.run import Run
from tests.support.running import registry_of
from tests.support.tasks import NAME, QUEUE


class FarSide:
    """
    The database and the worker, as seen by one attempt.

    Attributes:
        answers: What each settle returns or raises, in order; True once none are left.
        settled: Every settlement that was attempted.
        tried: Set once a settlement was attempted.
        handler_ends: The arguments of the calls of `on_handler_end`.
        ended: The attempts passed to `on_end`.
    """

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers = list(answers)
        self.settled: list[Settling] = []
        self.tried = asyncio.Event()
        self.handler_ends: list[float | None] = []
        self.ended: list[Attempt] = []
        self.has_ended = asyncio.Event()

    async def settle(self, settlings: Sequence[Settling]) -> Sequence[bool]:
        """
        Answer for a batch of one.
        """
        self.settled.extend(settlings)
        self.tried.set()
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return [answer]

    def on_end(self, attempt: Attempt) -> None:
        """
        Record the attempt.
        """
        self.ended.append(attempt)
        self.has_ended.set()

    @property
    def events(self) -> list[Event]:
        """
        The transitions that were attempted.
        """
        return [settling.settlement.event for settling in self.settled]


class NoMoreThreads(Isolation):
    """
    A machine that can start no more threads.
    """

    def prepare(self, *arguments: Any, **more: Any) -> Run:
        """
        Fail as `Thread.start` does.
        """
        raise RuntimeError("can't start new thread")


class BrokenBackoff(Backoff):
    """
    A backoff that a user wrote.
    """

    def delay_seconds(self, failures: int, *, random: float) -> float:
        """
        Fail as buggy code would.
        """
        raise ZeroDivisionError("no wait at all")


async def work() -> str:
    return "done"


async def fail() -> None:
    raise ValueError("no luck")


def fail_in_a_thread() -> None:
    raise ValueError("no luck")


def an_attempt(
    far_side: FarSide,
    name: str = NAME,
    *,
    function: Callable[..., Any] = work,
    isolation: Isolation | None = None,
    on_handler_end: Callable[[float | None], None] | None = None,
    **policy: Any,
) -> Attempt:
    """
    An attempt that has not started, of a worker with one handler.
    """
    return Attempt(
        Claim(
            task_id=uuid4(),
            lease_id=uuid4(),
            tenant_id=1,
            name=name,
            queue=QUEUE,
            attempt=1,
            failures=0,
            max_attempts=5,
            timeout_seconds=60.0,
            payload="{}",
            claimed_at=datetime.now(UTC),
        ),
        Tools(
            registry=registry_of(function, **policy),
            isolation=isolation or Isolation(slots=1),
            settler=Batcher(far_side.settle),
            on_progress=lambda claim, progress: None,
            on_handler_end=on_handler_end or far_side.handler_ends.append,
            on_end=far_side.on_end,
            settle_retry_seconds=(0.0, 0.001),
        ),
    )


async def execute(attempt: Attempt, far_side: FarSide) -> None:
    """
    Run an attempt, and check that it ends once.
    """
    attempt.start()
    await asyncio.wait_for(far_side.has_ended.wait(), 10)
    assert [attempt] == far_side.ended


async def test_an_attempt_is_settled_once_and_then_it_is_over() -> None:
    """
    In the normal case, an attempt settles once and ends once.
    """
    far_side = FarSide()
    attempt = an_attempt(far_side)

    await execute(attempt, far_side)

    assert [Event.COMPLETE] == far_side.events
    [ran_seconds] = far_side.handler_ends
    assert ran_seconds is not None


async def test_a_settle_is_tried_until_the_database_answers() -> None:
    """
    A settle is retried until the database answers, so no outage loses the result while the lease
    holds.
    """
    far_side = FarSide(*[StoreUnavailable("down")] * 20)

    await execute(an_attempt(far_side), far_side)

    assert [Event.COMPLETE] * 21 == far_side.events


async def test_an_unexpected_error_does_not_discard_a_result() -> None:
    """
    An unexpected error is not mistaken for a refusal of the result.
    """
    far_side = FarSide(RuntimeError("a bug in the driver"))

    await execute(an_attempt(far_side), far_side)

    assert [Event.COMPLETE] * 2 == far_side.events


async def test_an_outcome_that_is_refused_for_good_becomes_a_failure() -> None:
    """
    An outcome that is refused permanently becomes a failure that says why.
    """
    far_side = FarSide(*[ValueError("not storable")] * REFUSALS_MAX)

    await execute(an_attempt(far_side), far_side)

    assert [Event.COMPLETE] * REFUSALS_MAX + [Event.FAIL] == far_side.events
    failure = far_side.settled[-1].settlement.failure
    assert failure is not None
    assert "not storable" in failure.message


async def test_an_attempt_ends_even_if_nothing_of_it_can_be_stored() -> None:
    """
    An attempt that cannot be settled ends as void, and later heartbeats find a lease without an
    attempt.
    """
    far_side = FarSide(*[ValueError("no")] * 100)
    attempt = an_attempt(far_side)

    await execute(attempt, far_side)

    assert attempt.void is not None


async def test_a_void_attempt_stops_trying_to_settle() -> None:
    """
    An attempt that became void, because its worker was fenced during an outage, stops trying to
    settle.
    """
    far_side = FarSide(*[StoreUnavailable("down")] * 1_000_000)
    attempt = an_attempt(far_side)
    executing = asyncio.create_task(execute(attempt, far_side))
    await far_side.tried.wait()

    attempt.make_void("fenced")

    await executing


async def test_an_attempt_that_cannot_be_run_is_punished() -> None:
    """
    An attempt that cannot be run is charged, rather than raising, so the task is not retried
    forever.
    """
    far_side = FarSide()
    isolation = NoMoreThreads(slots=1)

    await execute(an_attempt(far_side, isolation=isolation), far_side)

    assert [Event.RETRY] == far_side.events
    assert [None] == far_side.handler_ends


async def test_an_unknown_name_is_a_failure() -> None:
    """
    A task with an unknown name fails; that should not happen, but is survived.
    """
    far_side = FarSide()

    await execute(an_attempt(far_side, "unknown"), far_side)

    failure = far_side.settled[0].settlement.failure
    assert failure is not None
    assert "UnknownHandler" == failure.kind


@pytest.mark.parametrize("function", [fail, fail_in_a_thread])
async def test_an_attempt_whose_backoff_fails_is_charged(function: Callable[..., Any]) -> None:
    """
    An attempt whose backoff fails is charged; if it never ended, its lease would be kept for as
    long as its worker lives.
    """
    far_side = FarSide()

    await execute(an_attempt(far_side, function=function, backoff=BrokenBackoff()), far_side)

    assert [Event.RETRY] == far_side.events
    failure = far_side.settled[0].settlement.failure
    assert failure is not None
    assert "Crashed" == failure.kind
    assert "ZeroDivisionError: no wait at all" in failure.message


async def test_an_attempt_about_which_nothing_can_be_decided_fails() -> None:
    """
    An attempt that cannot be decided fails its task: a dead letter is visible and can be redriven.
    """
    far_side = FarSide()
    attempt = an_attempt(far_side, function=fail)
    attempt.claim = attempt.claim._replace(max_attempts=None)  # type: ignore[arg-type]

    await execute(attempt, far_side)

    assert [Event.FAIL] == far_side.events


async def test_an_outcome_is_settled_whatever_the_worker_makes_of_the_slot(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    An error in the worker's slot bookkeeping does not affect the outcome, and is logged.
    """

    def lose_count(ran_seconds: float | None) -> None:
        raise RuntimeError("how many were there?")

    far_side = FarSide()

    await execute(an_attempt(far_side, on_handler_end=lose_count), far_side)

    assert [Event.COMPLETE] == far_side.events
    assert "how many were there?" in caplog.text


@pytest.mark.parametrize("answer", [True, False, StoreUnavailable("down")])
async def test_an_attempt_ends_although_nothing_can_be_logged(
    answer: bool | Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    An attempt ends even if logging fails, as on a standard error whose terminal is gone.
    """

    def cannot(level: str, event: str, fields: dict[str, Any]) -> None:
        raise OSError("no terminal")

    log = Log()
    log.configure("info", emit=cannot)
    monkeypatch.setattr(events, "log", log)
    far_side = FarSide(answer)

    await execute(an_attempt(far_side), far_side)

    assert {Event.COMPLETE} == set(far_side.events)


async def test_an_attempt_released_before_it_began_runs_no_handler() -> None:
    """
    An attempt released before it began never enters its handler.
    """
    far_side = FarSide()
    attempt = an_attempt(far_side)
    attempt.release()

    await execute(attempt, far_side)

    assert [Event.RELEASE] == far_side.events
    assert [None] == far_side.handler_ends


async def test_an_attempt_void_before_it_began_writes_nothing() -> None:
    """
    An attempt that is void before it begins settles nothing.
    """
    far_side = FarSide()
    attempt = an_attempt(far_side)
    attempt.make_void("fenced")

    await execute(attempt, far_side)

    assert [] == far_side.events


class Slow(FarSide):
    """
    A database that answers when the test allows it.
    """

    def __init__(self, *answers: bool | Exception) -> None:
        super().__init__(*answers)
        self.may_answer = asyncio.Event()

    async def settle(self, settlings: Sequence[Settling]) -> Sequence[bool]:
        """
        Answer for a batch of one, late.
        """
        answer = await super().settle(settlings)
        await self.may_answer.wait()
        return answer


async def test_a_handler_that_cancels_its_task_as_it_returns_is_settled_with_its_result() -> None:
    """
    The result is settled, although the cancellation would otherwise hit the first await after the
    handler: the settle.
    """

    async def cancel_itself() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        return "done"

    far_side = FarSide()

    await execute(an_attempt(far_side, function=cancel_itself), far_side)

    assert {Event.COMPLETE} == set(far_side.events)


async def test_a_handler_that_cancels_its_task_later_does_not_lose_the_settle() -> None:
    """
    A handler that kept its task and cancels it while the attempt waits for PostgreSQL does not lose
    the settle.
    """
    kept: list[asyncio.Task[Any]] = []

    async def keep_its_task() -> str:
        task = asyncio.current_task()
        assert task is not None
        kept.append(task)
        return "done"

    far_side = Slow()
    attempt = an_attempt(far_side, function=keep_its_task)
    executing = asyncio.create_task(execute(attempt, far_side))
    await far_side.tried.wait()

    for _ in range(3):
        kept[0].cancel()
        await asyncio.sleep(0)
    assert not far_side.has_ended.is_set()
    far_side.may_answer.set()

    await executing
    assert {Event.COMPLETE} == set(far_side.events)


async def test_a_handler_that_cancels_its_task_later_cannot_stop_tries_to_settle() -> None:
    """
    Nor does a cancellation between two tries stop an attempt from settling.
    """
    kept: list[asyncio.Task[Any]] = []

    async def keep_its_task() -> str:
        task = asyncio.current_task()
        assert task is not None
        kept.append(task)
        return "done"

    far_side = FarSide(*[StoreUnavailable("down")] * 20)
    attempt = an_attempt(far_side, function=keep_its_task)
    executing = asyncio.create_task(execute(attempt, far_side))
    await far_side.tried.wait()

    for _ in range(10):
        kept[0].cancel()
        far_side.tried.clear()
        await far_side.tried.wait()

    await executing
    assert {Event.COMPLETE} == set(far_side.events)


@pytest.mark.parametrize("is_void", [False, True])
async def test_an_attempt_whose_handler_ignores_its_end_ends_without_it(is_void: bool) -> None:
    """
    The settle moves to another asyncio task; when the handler finally ends, nothing more is
    written.
    """
    entered, may_end = asyncio.Event(), asyncio.Event()

    async def ignore() -> str:
        entered.set()
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                continue
        return "too late"

    far_side = FarSide()
    isolation = Isolation(slots=1, cancel_grace_seconds=0.01)
    attempt = an_attempt(far_side, function=ignore, isolation=isolation)
    executing = asyncio.create_task(execute(attempt, far_side))
    await entered.wait()

    if is_void:
        attempt.make_void("fenced")
    else:
        attempt.cancel()

    await executing
    assert ([] if is_void else [Event.CANCEL]) == far_side.events
    assert 1 == isolation.stuck
    may_end.set()
    while isolation.stuck:  # noqa: ASYNC110 - a turn or two of the loop
        await asyncio.sleep(0)
    assert [attempt] == far_side.ended
    assert ([] if is_void else [Event.CANCEL]) == far_side.events


async def test_an_attempt_cancelled_before_its_first_step_is_settled() -> None:
    """
    An attempt cancelled before its first step is settled and never enters its handler.
    """
    entered = False

    async def enter() -> None:
        nonlocal entered
        entered = True

    far_side = FarSide()
    attempt = an_attempt(far_side, function=enter)
    attempt.start()

    attempt.cancel()

    await asyncio.wait_for(far_side.has_ended.wait(), 10)
    assert ([Event.CANCEL], False) == (far_side.events, entered)


async def test_a_handler_that_cancels_every_task_does_not_end_an_attempt_in_a_thread() -> None:
    """
    Code of another handler may cancel all tasks of the loop; the attempt keeps its outcome.
    """
    entered, may_end = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait() -> str:
        loop.call_soon_threadsafe(entered.set)
        assert may_end.wait(60)
        return "done"

    far_side = FarSide()
    attempt = an_attempt(far_side, function=wait)
    attempt.start()
    await asyncio.wait_for(entered.wait(), 60)

    for _ in range(2):
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
    may_end.set()

    await asyncio.wait_for(far_side.has_ended.wait(), 60)
    assert [Event.COMPLETE] == far_side.events


async def test_an_attempt_whose_task_is_cancelled_before_its_first_step_is_released() -> None:
    """
    Its slot is free again, and its task goes to another worker.
    """
    far_side = FarSide()
    attempt = an_attempt(far_side)
    attempt.start()

    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0)
    attempt.revive()
    attempt.revive()

    await asyncio.wait_for(far_side.has_ended.wait(), 60)
    assert ([Event.RELEASE], [None]) == (far_side.events, far_side.handler_ends)


class Ballast:
    """
    Something large that a handler holds.
    """


async def test_a_cancelled_handler_leaves_none_of_its_variables_behind() -> None:
    """
    Workers collect cycles rarely, so an attempt must not leave one.
    """
    entered = asyncio.Event()
    held: list[weakref.ref[Ballast]] = []

    async def hold() -> None:
        ballast = Ballast()
        held.append(weakref.ref(ballast))
        entered.set()
        await asyncio.sleep(3600)

    gc.disable()
    try:
        far_side = FarSide()
        attempt = an_attempt(far_side, function=hold)
        attempt.start()
        await asyncio.wait_for(entered.wait(), 60)
        attempt.cancel()
        await asyncio.wait_for(far_side.has_ended.wait(), 60)
        for _ in range(3):  # turns of the loop that end the attempt's task
            await asyncio.sleep(0)

        assert [None] == [reference() for reference in held]
    finally:
        gc.enable()
