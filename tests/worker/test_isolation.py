"""
Whatever a handler does, its attempt ends with one outcome, and on time.
"""

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from functools import partial

import psutil
import pytest
import pytest_asyncio

from asyncflow.domain.outcome import Cancelled, Completed, Crashed, Failed, Failure, Outcome
from asyncflow.handlers import (
    DEFAULT_REGISTRY,
    Context,
    Handler,
    Progress,
    Registry,
    current_context,
    handler,
)
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.isolation.nursery import Nursery
from asyncflow.worker.isolation.run import Run
from tests.support.builders import a_claim
from tests.worker import odd_handlers

ISOLATIONS = ["loop", "thread", "process", "process-async"]

# One loop for the module, so that one warm child serves most of the table.
pytestmark = pytest.mark.asyncio(loop_scope="module")


MODULES = ["tests.worker.odd_handlers"]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def nursery() -> AsyncIterator[Nursery]:
    """
    The nursery that starts the child processes of these tests.
    """
    async with Nursery(MODULES) as nursery:
        yield nursery


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def isolation(nursery: Nursery) -> AsyncIterator[Isolation]:
    """
    An isolation with a short grace period.
    """
    isolation = Isolation(slots=4, cancel_grace_seconds=0.2, nursery=nursery)
    yield isolation
    await isolation.close()


@pytest_asyncio.fixture(loop_scope="module")
async def patient(nursery: Nursery) -> AsyncIterator[Isolation]:
    """
    An isolation that force-stops nothing within the duration of a test.
    """
    isolation = Isolation(slots=4, cancel_grace_seconds=60, nursery=nursery)
    yield isolation
    await isolation.close()


def the(name: str) -> Handler:
    """
    The odd handler with this name.
    """
    found = DEFAULT_REGISTRY.get(name)
    assert found is not None, name
    return found


def a_context(
    *, timeout_seconds: float = 60.0, on_progress: Callable[[Progress], None] | None = None
) -> Context:
    """
    The context of a first attempt.
    """
    claim = a_claim(name="odd", timeout_seconds=timeout_seconds)
    return Context(claim, on_progress=on_progress)


class Begun:
    """
    Collects progress; a test can wait for the first report, from any thread.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._first = asyncio.Event()
        self.reports: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        self.reports.append(progress)
        self._loop.call_soon_threadsafe(self._first.set)

    async def message(self) -> str:
        """
        Wait for the first report; return its message.
        """
        await asyncio.wait_for(self._first.wait(), 10)
        return self.reports[0].message or ""


def begin(
    isolation: Isolation, handler: Handler, context: Context, payload: str = "{}"
) -> tuple[Run, asyncio.Future[Outcome | None]]:
    """
    Start a run in a task, as an attempt does; the future gets its outcome.
    """
    ended: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
    run = isolation.prepare(handler, payload, context, ended.set_result)

    async def work() -> None:
        outcome = await run.outcome()
        if not ended.done():
            ended.set_result(outcome)

    working = asyncio.get_running_loop().create_task(work())
    ended.add_done_callback(lambda _: working)  # keeps it
    return run, ended


async def start(
    isolation: Isolation, handler: Handler
) -> tuple[Run, asyncio.Future[Outcome | None], str]:
    """
    Start a handler that reports its start, and wait for that report.
    """
    begun = Begun()
    run, ended = begin(isolation, handler, a_context(on_progress=begun))
    return run, ended, await begun.message()


async def run(
    isolation: Isolation,
    handler: Handler,
    payload: str = "{}",
    *,
    timeout_seconds: float = 60.0,
    context: Context | None = None,
) -> Outcome:
    """
    Run a handler to its end.
    """
    context = context or a_context(timeout_seconds=timeout_seconds)
    _, ended = begin(isolation, handler, context, payload)
    outcome = await asyncio.wait_for(ended, 30)
    assert outcome is not None
    return outcome


async def failure_in(isolation: Isolation, handler: Handler, payload: str = "{}") -> Failed:
    """
    Run a handler that must fail; return its failure.
    """
    outcome = await run(isolation, handler, payload)
    assert isinstance(outcome, Failed)
    return outcome


def named(what: str, where: str) -> Handler:
    """
    The handler that does `what` in the isolation `where`.
    """
    return the(f"{what.replace(' ', '-')}.{where}")


@pytest.mark.parametrize("where", ISOLATIONS)
@pytest.mark.parametrize("before", ISOLATIONS)
async def test_an_attempt_finds_nothing_in_its_context_of_the_one_before(
    isolation: Isolation, before: str, where: str
) -> None:
    """
    An attempt that reuses the asyncio task of an earlier one sees none of its context variables,
    only those set at import.
    """

    async def work() -> Outcome | None:
        marking = isolation.prepare(named("mark", before), "{}", a_context(), unexpected)
        await marking.outcome()
        looking = isolation.prepare(named("look", where), "{}", a_context(), unexpected)
        return await looking.outcome()

    assert Completed('["nobody","set at import",{}]') == await asyncio.wait_for(work(), 30)


def unexpected(outcome: Outcome | None) -> None:
    """
    Fail: these handlers always end.
    """
    raise AssertionError(outcome)


@pytest.mark.parametrize("where", ISOLATIONS)
async def test_what_follows_an_attempt_runs_in_the_workers_context(
    isolation: Isolation, where: str
) -> None:
    """
    What follows an attempt runs in the worker's context: log lines, and the tasks that write
    outcomes in batches.
    """

    async def work() -> list[object]:
        await isolation.prepare(named("mark", where), "{}", a_context(), unexpected).outcome()
        with pytest.raises(LookupError):
            current_context()
        return odd_handlers.look()

    assert ["nobody", "set at import", {}] == await asyncio.wait_for(work(), 30)


@pytest.mark.parametrize("where", ISOLATIONS)
@pytest.mark.parametrize("what", odd_handlers.RETURNS)
async def test_whatever_json_can_say_is_a_result(
    isolation: Isolation, what: str, where: str
) -> None:
    """
    Values of plain and rich types complete, and characters that PostgreSQL refuses are replaced.
    """
    expected = odd_handlers.RETURNS[what][1]

    outcome = await run(isolation, named(what, where))

    assert Completed(expected) == outcome


@pytest.mark.parametrize("where", ISOLATIONS)
@pytest.mark.parametrize("what", odd_handlers.UNSTORABLE)
async def test_a_result_that_cannot_be_kept_fails_for_good(
    isolation: Isolation, what: str, where: str
) -> None:
    """
    An unusable result fails without a retry, and a sentence says why.
    """
    kind = odd_handlers.UNSTORABLE[what][1]

    outcome = await failure_in(isolation, named(what, where))

    assert (kind, False) == (outcome.failure.kind, outcome.retryable)
    assert outcome.failure.message.startswith(("The result ", "The handler returned "))
    _assert_storable(outcome.failure)


@pytest.mark.parametrize("where", ISOLATIONS)
@pytest.mark.parametrize("what", odd_handlers.RAISES)
async def test_whatever_is_raised_is_a_failure(isolation: Isolation, what: str, where: str) -> None:
    """
    Every exception, printable or not, ends the attempt and nothing else.
    """
    _, kind, message, retryable = odd_handlers.RAISES[what]

    outcome = await failure_in(isolation, named(what, where))

    assert (kind, retryable) == (outcome.failure.kind, outcome.retryable)
    assert message in outcome.failure.message
    _assert_storable(outcome.failure)


@pytest.mark.parametrize("where", ISOLATIONS)
async def test_stop_iteration_is_a_failure(isolation: Isolation, where: str) -> None:
    """
    StopIteration is a failure, although Python turns it into a RuntimeError inside a coroutine.
    """
    outcome = await failure_in(isolation, named("stop", where))

    assert outcome.failure.kind in ("StopIteration", "RuntimeError")
    assert outcome.retryable


@pytest.mark.parametrize("where", ISOLATIONS)
@pytest.mark.parametrize(
    "what", ["unfinished retry", "retry at no time", "retry in a word", "retry much too late"]
)
async def test_a_wait_that_makes_no_sense_is_left_to_the_backoff(
    isolation: Isolation, what: str, where: str
) -> None:
    """
    An invalid wait, from a subclass of `Retry`, is ignored in favour of the backoff and never
    reaches SQL.
    """
    outcome = await failure_in(isolation, named(what, where))

    assert outcome.after_seconds is None


async def test_a_task_that_exits_inside_of_a_child_is_a_failure(isolation: Isolation) -> None:
    """
    A task that exits inside a child ends only the child's event loop, and the attempt fails.
    """
    outcome = await failure_in(isolation, the("exit-in-a-task.process-async"))

    assert ("SystemExit", True) == (outcome.failure.kind, outcome.retryable)


async def test_a_result_that_never_ends_is_stopped_with_its_child(isolation: Isolation) -> None:
    """
    Serialising a result is part of the attempt: it counts towards the timeout, and its child can be
    killed.
    """
    running, ended, _ = await start(isolation, the("rows-without-end.process"))

    running.cancel()

    outcome = await asyncio.wait_for(ended, 10)
    assert isinstance(outcome, Cancelled)
    assert "was killed" in outcome.failure.message


def _assert_storable(failure: Failure) -> None:
    texts = ((failure.kind, 256), (failure.message, 4096), (failure.traceback or "", 16384))
    for text, bytes_max in texts:
        assert len(text.encode()) <= bytes_max
        assert "\0" not in text


async def test_a_traceback_begins_in_the_handler(isolation: Isolation) -> None:
    """
    A traceback begins in the handler, so that people read their own code and not ours.
    """
    outcome = await failure_in(isolation, the("error.thread"))

    lines = (outcome.failure.traceback or "").splitlines()
    assert "odd_handlers.py" in lines[1]
    assert "ValueError: wrong" == lines[-1]


@pytest.mark.parametrize("where", ISOLATIONS)
async def test_a_payload_that_does_not_fit_fails_for_good(isolation: Isolation, where: str) -> None:
    """
    A payload that does not fit fails for good without entering the handler, and the error names the
    place.
    """
    outcome = await failure_in(isolation, named("nothing", where), '{"more": 1}')

    assert ("InvalidPayload", False) == (outcome.failure.kind, outcome.retryable)
    assert "/more" in outcome.failure.message


@pytest.mark.parametrize("name", ["wait.loop", "poll.thread", "poll.process", "wait.process-async"])
async def test_a_handler_that_listens_times_out_within_the_grace_period(
    patient: Isolation, name: str
) -> None:
    """
    A handler that stops when asked times out within the grace period, as a retryable failure.
    """
    outcome = await run(patient, the(name), timeout_seconds=0.3)

    assert isinstance(outcome, Failed)
    assert ("TimedOut", True) == (outcome.failure.kind, outcome.retryable)
    assert "timeout of 0.3 s" in outcome.failure.message
    assert "odd_handlers.py" in (outcome.failure.traceback or "")
    assert 0 == patient.stuck


@pytest.mark.parametrize("name", ["wait.loop", "poll.thread", "poll.process", "wait.process-async"])
async def test_a_handler_that_listens_is_cancelled_within_the_grace_period(
    patient: Isolation, name: str
) -> None:
    """
    A cancellation reaches the handler in every isolation.
    """
    running, ended, _ = await start(patient, the(name))

    running.cancel()

    assert isinstance(await asyncio.wait_for(ended, 10), Cancelled)


@pytest.mark.parametrize("name", ["nothing.loop", "poll.thread", "poll.process", "wait.loop"])
async def test_an_attempt_cancelled_before_it_starts_still_ends(
    patient: Isolation, name: str
) -> None:
    """
    A cancellation requested before the attempt starts still ends it.
    """
    running, ended = begin(patient, the(name), a_context())

    running.cancel()

    assert isinstance(await asyncio.wait_for(ended, 10), Cancelled)


@pytest.mark.parametrize("where", ISOLATIONS)
async def test_what_a_stopped_handler_returns_does_not_count(
    patient: Isolation, where: str
) -> None:
    """
    The result of a handler that knew it should stop is discarded, since it may be incomplete.
    """
    running, ended, _ = await start(patient, the(f"shrug.{where}"))

    running.cancel()

    assert isinstance(await asyncio.wait_for(ended, 10), Cancelled)


@pytest.mark.parametrize("where", ["thread", "process"])
async def test_what_an_unaware_handler_returns_in_the_grace_period_counts(
    patient: Isolation, where: str
) -> None:
    """
    The result of a handler that never checked `cancelled` counts, since its work is complete.
    """
    running, ended, _ = await start(patient, the(f"late.{where}"))

    running.cancel()

    assert Completed('"whole"') == await asyncio.wait_for(ended, 10)


@pytest.mark.parametrize("where", ["loop", "thread"])
async def test_a_handler_that_cannot_be_stopped_is_given_up(
    isolation: Isolation, where: str
) -> None:
    """
    The attempt of a handler that cannot be stopped ends, and the handler counts as stuck until it
    really ends.
    """
    odd_handlers.UNSTUCK.clear()
    before = isolation.stuck

    outcome = await run(isolation, the(f"ignore.{where}"), timeout_seconds=0.05)

    assert isinstance(outcome, Failed)
    assert "TimedOut" == outcome.failure.kind
    assert 'isolation="process"' in outcome.failure.message
    assert before + 1 == isolation.stuck
    odd_handlers.UNSTUCK.set()
    await _until(lambda: isolation.stuck == before)


@pytest.mark.parametrize("name", ["ignore.process", "hog.process"])
async def test_a_child_that_does_not_stop_is_killed(isolation: Isolation, name: str) -> None:
    """
    Neither a stubborn handler nor one that holds the GIL survives the grace period.
    """
    running, ended, _ = await start(isolation, the(name))

    running.cancel()

    outcome = await asyncio.wait_for(ended, 10)
    assert isinstance(outcome, Cancelled)
    assert "was killed" in outcome.failure.message


async def test_a_stuck_thread_does_not_take_a_live_ones_place(isolation: Isolation) -> None:
    """
    However many threads are stuck, the next attempt gets one.
    """
    odd_handlers.UNSTUCK.clear()
    handler = the("ignore.thread")
    await asyncio.gather(*(run(isolation, handler, timeout_seconds=0.01) for _ in range(8)))

    outcome = await run(isolation, the("number.thread"), timeout_seconds=5)

    assert Completed("1.5") == outcome
    odd_handlers.UNSTUCK.set()
    await _until(lambda: isolation.stuck == 0)


@pytest.mark.parametrize(
    ("payload", "words"),
    [('{"status": 0}', "status 0"), ('{"status": 137}', "status 137")],
)
async def test_a_child_that_exits_is_a_crash(
    isolation: Isolation, payload: str, words: str
) -> None:
    """
    A child that exits is a crash even with status 0, since the handler did not return.
    """
    outcome = await run(isolation, the("leave.process"), payload)

    assert isinstance(outcome, Crashed)
    assert f"exited with {words}." in outcome.failure.message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
async def test_a_child_that_dies_of_a_signal_is_a_crash(
    isolation: Isolation, number: signal.Signals
) -> None:
    """
    A child that dies of a signal is a crash, and the outcome names the signal.
    """
    outcome = await run(isolation, the("signal.process"), f'{{"number": {number:d}}}')

    assert isinstance(outcome, Crashed)
    assert f"killed by signal {number:d} ({number.name})" in outcome.failure.message


async def test_a_killed_child_is_noticed_immediately(isolation: Isolation) -> None:
    """
    A killed child is noticed within milliseconds.
    """
    _, ended, message = await start(isolation, the("family.process"))

    killed_at = time.monotonic()
    os.kill(int(message.split()[0]), signal.SIGKILL)
    await ended

    assert time.monotonic() - killed_at < 0.5


async def test_what_a_handler_started_dies_with_it(isolation: Isolation) -> None:
    """
    Programs started by a handler are killed with it.
    """
    running, ended, message = await start(isolation, the("family.process"))

    running.cancel()
    await ended

    await _until_gone(*map(int, message.split()))


WORKER = """
import asyncio, sys
sys.path[:] = {path!r}
from tests.worker.test_isolation import a_context, begin
from asyncflow.handlers import load_handlers
from asyncflow.worker.isolation.nursery import Nursery
from asyncflow.worker.isolation.isolation import Isolation

async def main():
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()
    handler = load_handlers(["tests.worker.odd_handlers"]).get({name!r})
    context = a_context(on_progress=lambda _: loop.call_soon_threadsafe(begun.set))
    isolation = Isolation(slots=1, nursery=Nursery(["tests.worker.odd_handlers"]))
    _, ended = begin(isolation, handler, context)
    await begun.wait()
    print("begun", flush=True)
    await asyncio.wait([ended], timeout={patience})

asyncio.run(main())
"""


def a_worker(name: str, *, patience: float) -> subprocess.Popen[str]:
    """
    A process that runs one handler and reports when it has started.
    """
    code = WORKER.format(path=sys.path, name=name, patience=patience)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("name", ["family.process", "hog.process"])
async def test_children_die_with_their_worker(name: str) -> None:
    """
    When a worker is killed, its handlers die too, and so does everything they started.
    """
    with a_worker(name, patience=60) as worker:
        _wait_until_begun(worker)
        family = psutil.Process(worker.pid).children(recursive=True)
        worker.kill()

    assert len(family) >= 2
    await _until_gone(*(process.pid for process in family))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_children_leave_signals_to_their_worker(
    patient: Isolation, number: signal.Signals
) -> None:
    """
    Children ignore the signals of a service manager; the worker decides whether handlers may
    finish.
    """
    running, ended, _ = await start(patient, the("poll.process"))
    for process in psutil.Process().children(recursive=True):
        # Servers of other tests may have left a zombie process.
        with contextlib.suppress(psutil.NoSuchProcess):
            if "asyncflow.worker.isolation.nursery_process" in process.cmdline():
                process.send_signal(number)

    running.cancel()

    assert isinstance(await asyncio.wait_for(ended, 10), Cancelled)


async def test_what_a_handler_forks_can_be_terminated(isolation: Isolation) -> None:
    """
    Processes that a handler forks, as `multiprocessing.Pool` does, can be terminated, unlike the
    children themselves.
    """
    outcome = await run(isolation, the("fork.process"))

    assert Completed(str(-signal.SIGTERM.value)) == outcome


async def _pid(isolation: Isolation) -> int:
    outcome = await run(isolation, the("pid.process"))
    assert isinstance(outcome, Completed)
    return int(outcome.result)


async def test_a_child_is_reused_and_then_replaced(nursery: Nursery) -> None:
    """
    A child is reused for a number of attempts and then replaced, so that leaks do not add up.
    """
    isolation = Isolation(slots=1, tasks_per_child_max=2, nursery=nursery)

    pids = [await _pid(isolation) for _ in range(3)]

    await isolation.close()
    assert pids[0] == pids[1] != pids[2]


async def test_a_child_that_died_idle_costs_no_attempt(nursery: Nursery) -> None:
    """
    If an idle child has died, another one takes over the attempt.
    """
    isolation = Isolation(slots=1, nursery=nursery)
    first = await _pid(isolation)
    os.kill(first, signal.SIGKILL)

    second = await _pid(isolation)

    await isolation.close()
    assert first != second


async def test_closing_ends_every_child(nursery: Nursery) -> None:
    """
    Closing the nursery ends every child, idle or busy.
    """
    isolation = Isolation(slots=2, nursery=nursery)
    idle = await _pid(isolation)
    _, ended, message = await start(isolation, the("family.process"))

    await isolation.close()

    await _until_gone(idle, *map(int, message.split()))
    assert isinstance(await ended, Crashed)


@pytest.mark.parametrize("name", ["grow.process", "grow-a-program.process"])
async def test_a_memory_limit_holds_for_the_whole_process_tree(
    isolation: Isolation, name: str
) -> None:
    """
    An attempt whose process tree exceeds the limit is killed, and the outcome gives usage and
    limit.
    """
    outcome = await failure_in(isolation, the(name))

    assert ("MemoryExceeded", True) == (outcome.failure.kind, outcome.retryable)
    assert "more than its limit of 64.0 MiB" in outcome.failure.message


async def test_progress_comes_through_from_a_child_without_flooding(isolation: Isolation) -> None:
    """
    Of a hundred thousand reports the latest arrives, and most others are dropped.
    """
    begun = Begun()
    context = a_context(on_progress=begun)

    await run(isolation, the("chat.process"), '{"times": 100000}', context=context)

    assert (1.0, "last") == (begun.reports[-1].fraction, begun.reports[-1].message)
    assert len(begun.reports) < 1_000


async def test_a_child_sees_the_same_context(isolation: Isolation) -> None:
    """
    Ids, queue, attempt and remaining time are the same in a child.
    """
    context = a_context(timeout_seconds=60)

    outcome = await run(isolation, the("describe.process"), context=context)

    assert isinstance(outcome, Completed)
    seen = json.loads(outcome.result)
    assert 0 < seen.pop("remaining") <= 60
    assert {
        "task_id": str(context.task_id),
        "lease_id": str(context.lease_id),
        "tenant_id": 1,
        "queue": "default",
        "attempt": 1,
        "max_attempts": 5,
    } == seen


async def test_standard_output_belongs_to_the_handler(capfd: pytest.CaptureFixture[str]) -> None:
    """
    What a handler prints appears when its attempt ends, and disturbs nothing.
    """
    async with Nursery(MODULES) as nursery:  # a separate one: children inherit its output
        isolation = Isolation(slots=1, nursery=nursery)

        outcome = await run(isolation, the("print.process"))

        output = capfd.readouterr()
        await isolation.close()
    assert Completed("null") == outcome
    assert {"to standard output", "raw"} == set(output.out.split("\n")) - {""}
    assert "to standard error\n" == output.err


async def test_a_child_logs_as_its_worker_does(capfd: pytest.CaptureFixture[str]) -> None:
    """
    A child logs one line per event, with task and attempt, whichever logger writes it.
    """
    async with Nursery(MODULES, logs={"level": "info", "log_format": "json"}) as nursery:
        isolation = Isolation(slots=1, nursery=nursery)

        await run(isolation, the("log.process"))

        lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
        await isolation.close()
    assert [
        ("looked", "stars", "odd", 1),
        ("counted 7", "moons", "odd", 1),
        ("looked again", "stars", "odd", 1),
    ] == [(line["event"], line["at"], line["task_name"], line["attempt"]) for line in lines]


async def test_a_handler_that_closes_the_connection_is_a_crash(isolation: Isolation) -> None:
    """
    Even if a handler closes every file descriptor, the attempt ends, as a crash.
    """
    outcome = await run(isolation, the("close.process"))

    assert isinstance(outcome, Crashed)


VARIABLE: ContextVar[str] = ContextVar("variable", default="unset")


@pytest.mark.parametrize("is_async", [True, False])
async def test_context_variables_go_in_but_do_not_come_out(
    isolation: Isolation, is_async: bool
) -> None:
    """
    A handler sees its worker's context variables, and those it sets do not leak out.
    """

    async def in_loop() -> str:
        seen = VARIABLE.get()
        VARIABLE.set("changed")
        return seen

    def in_thread() -> str:
        seen = VARIABLE.get()
        VARIABLE.set("changed")
        return seen

    token = VARIABLE.set("the worker's")
    registry = Registry()
    handler("variables", registry=registry)(in_loop if is_async else in_thread)
    (variables,) = registry

    outcomes = [await run(isolation, variables) for _ in range(2)]

    assert [Completed('"the worker\'s"')] * 2 == outcomes
    assert "the worker's" == VARIABLE.get()
    VARIABLE.reset(token)


@pytest.mark.parametrize("where", ["loop", "thread", "process"])
async def test_an_interrupted_run_takes_its_handler_along(patient: Isolation, where: str) -> None:
    """
    An interrupted run, whose outcome is not needed, stops without a grace period and leaves no
    handler behind.
    """
    names = {"loop": "wait.loop", "thread": "poll.thread", "process": "ignore.process"}
    running, ended, _ = await start(patient, the(names[where]))

    running.interrupt()

    assert await asyncio.wait_for(ended, 10) is None
    assert 0 == patient.stuck


async def test_an_interrupted_run_that_does_not_stop_is_given_up(patient: Isolation) -> None:
    """
    An interrupted run whose handler does not stop ends anyway, and counts as stuck until the
    handler ends.
    """
    odd_handlers.UNSTUCK.clear()
    running, ended = begin(patient, the("ignore.loop"), a_context())
    await asyncio.sleep(0)

    running.interrupt()

    assert await asyncio.wait_for(ended, 10) is None
    assert 1 == patient.stuck
    odd_handlers.UNSTUCK.set()
    await _until(lambda: patient.stuck == 0)


async def test_what_an_unaware_handler_returns_when_interrupted_counts(patient: Isolation) -> None:
    """
    The result of an interrupted handler that never checked `cancelled` counts, since its work is
    complete and need not run again.
    """
    running, ended, _ = await start(patient, the("late.thread"))

    running.interrupt()

    assert Completed('"whole"') == await asyncio.wait_for(ended, 10)


@pytest.mark.parametrize("name", ["number.process", "number.process-async"])
async def test_a_run_interrupted_before_its_child_is_there_ends(
    patient: Isolation, name: str
) -> None:
    """
    A run interrupted before its child is ready ends immediately, and the child is kept for the next
    run.
    """
    running, ended = begin(patient, the(name), a_context())
    await asyncio.sleep(0)  # It asks for a child.

    running.interrupt()

    assert await asyncio.wait_for(ended, 10) is None
    assert Completed("1.5") == await run(patient, the(name))


async def test_deadlines_ring_in_their_order(patient: Isolation) -> None:
    """
    One timer serves all deadlines, and a later one does not hide an earlier one.
    """
    order: list[float] = []
    last, last_ended = begin(patient, the("wait.loop"), a_context(timeout_seconds=30.0))
    endings = []
    for seconds in (0.3, 0.1, 0.2):
        _, ended = begin(patient, the("wait.loop"), a_context(timeout_seconds=seconds))
        ended.add_done_callback(partial(_note, order, seconds))
        endings.append(ended)

    await asyncio.wait_for(asyncio.gather(*endings), 10)

    assert [0.1, 0.2, 0.3] == order
    assert not last_ended.done()
    last.interrupt()
    await asyncio.wait_for(last_ended, 10)


@pytest.mark.parametrize("where", ISOLATIONS)
async def test_an_attempt_leaves_nothing_behind(isolation: Isolation, where: str) -> None:
    """
    An attempt leaves no timer and no task behind, so a worker can run for months.
    """
    for _ in range(10):
        await run(isolation, named("number", where), timeout_seconds=900)

    await asyncio.sleep(0)
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Run)]


async def test_stuck_threads_do_not_keep_a_process_alive() -> None:
    """
    A process exits although a handler's thread never ends.
    """
    with a_worker("ignore.thread", patience=0) as worker:
        _wait_until_begun(worker)

        assert 0 == worker.wait(timeout=10)


def _wait_until_begun(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    assert "begun\n" == worker.stdout.readline()


def _note(order: list[float], seconds: float, _: object) -> None:
    order.append(seconds)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing signals the death of a grandchild
            await asyncio.sleep(0.005)


async def _until_gone(*pids: int) -> None:
    def is_gone(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    await _until(lambda: all(map(is_gone, pids)))


async def test_a_handler_whose_thread_cannot_start_never_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    If no thread can be started the task is released, and a thread that becomes free later does not
    run it.
    """
    ran: list[str] = []
    isolation = Isolation(slots=2)
    registry = Registry()
    handler("first", registry=registry)(lambda: ran.append("first"))
    handler("second", registry=registry)(lambda: ran.append("second"))
    first, second = registry.get("first"), registry.get("second")
    assert first is not None and second is not None

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as no_threads:
        no_threads.setattr(threading.Thread, "start", refuse)
        _, ended = begin(isolation, first, a_context(timeout_seconds=0.05))
        outcome = await asyncio.wait_for(ended, 30)

    assert outcome is None
    assert isolation.shortage.lasts
    assert isinstance(await run(isolation, second), Completed)
    assert isinstance(await run(isolation, second, timeout_seconds=0.2), Completed)
    await isolation.close()
    assert ["second", "second"] == ran
    assert 0 == isolation.stuck


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_payload_that_does_not_fit_may_be_tried_again(
    isolation: Isolation, is_async: bool
) -> None:
    """
    A payload that does not fit is retried if the handler says so, since a worker with newer code
    may accept it.
    """

    async def in_loop(a: int) -> None: ...
    def in_thread(a: int) -> None: ...

    registry = Registry()
    declare = handler("picky", invalid_payload="retry", registry=registry)
    declare(in_loop if is_async else in_thread)
    (picky,) = registry

    outcome = await failure_in(isolation, picky, '{"b": 1}')

    assert ("InvalidPayload", True) == (outcome.failure.kind, outcome.retryable)
