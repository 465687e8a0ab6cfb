"""
Every step of a task's path at which a process can be made to fail, and how.

A failpoint is planted from outside, by wrapping a function of the product when a process starts
(`process`), so AsyncFlow itself contains no trace of it. It fires once: it records that it fires
(`FIRED`), and then it acts.

    before    before the function is called
    after     when the function has returned
    unread    when the server has done what the function asked for, and its answer is on the
              wire but not read

    exit          the process is killed
    raise         the step fails with an unexpected error
    freeze        the process is suspended past its lease, until the test resumes it
    cut-postgres  its connections to PostgreSQL are reset
    cut-broker    its connections to RabbitMQ are reset

The last two, and holding answers back, are done by the test's wires (`wire`), which the process
controls through a socket, one line per order. `cases.txt` lists what must hold after each.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

ANSWER_SECONDS_MAX = 10.0

POINT, ACTION = "ASYNCFLOW_TEST_POINT", "ASYNCFLOW_TEST_ACTION"
FIRED = "ASYNCFLOW_TEST_FIRED"
"""The file that a failpoint creates when it fires; it does not fire if the file exists."""

CONTROL = "ASYNCFLOW_TEST_CONTROL"
"""The port on which the test takes orders for its wires."""

CHILD = "asyncflow.worker.isolation.nursery_process"


class Call(NamedTuple):
    """
    One call of a wrapped function; `result` is None until it has returned.
    """

    arguments: tuple[Any, ...]
    result: Any


@dataclass(frozen=True, slots=True)
class Failpoint:
    """
    One step.

    Attributes:
        role: The kind of process that runs the step: api, worker, maintenance, or a worker's child.
        target: The function, as the `module:name` under which its callers look it up.
        when: before, after or unread.
        story: What the task goes through; see `stories`.
        counts: Whether a call is the intended one. A call that found nothing to do never is.
        statement: For unread answers of PostgreSQL: a substring of the statement.
        handler: The handler that the task runs.
    """

    name: str
    role: str
    target: str
    when: str
    story: str = "task"
    counts: Callable[[Call], bool] = lambda call: True
    statement: str = ""
    handler: str = "step-in-loop"

    def plant(self, action: str) -> None:
        """
        Wrap the function in this process.
        """
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for parent in parents:
            owner = getattr(owner, parent)
        charge = Charge(self, action)
        original = getattr(owner, name)
        is_async = inspect.iscoroutinefunction(original)
        setattr(owner, name, (charge.wrapped_async if is_async else charge.wrapped)(original))


class Charge:
    """
    A planted failpoint, waiting for its call, and its action.
    """

    def __init__(self, point: Failpoint, action: str) -> None:
        self._point = point
        self._action = action
        self._is_live = True
        self._deciding = threading.Lock()

    def wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """
        Wrap a plain function with the failpoint before or after it.
        """

        def call(*arguments: Any, **more: Any) -> Any:
            if self._point.when == "before" and self._goes_off(Call(arguments, None)):
                self._act()
            result = original(*arguments, **more)
            if self._point.when == "after" and self._goes_off(Call(arguments, result)):
                self._act()
            return result

        return call

    def wrapped_async(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """
        Wrap a coroutine function with the failpoint before, after or inside it.
        """

        async def call(*arguments: Any, **more: Any) -> Any:
            if self._point.when == "unread" and self._goes_off(Call(arguments, None)):
                return await self._act_before_the_answer(original(*arguments, **more))
            if self._point.when == "before" and self._goes_off(Call(arguments, None)):
                self._act()
            result = await original(*arguments, **more)
            if self._point.when == "after" and self._goes_off(Call(arguments, result)):
                self._act()
            return result

        return call

    def _goes_off(self, call: Call) -> bool:
        with self._deciding:
            found_nothing = call.result is not None and not call.result
            if not self._is_live or found_nothing or not self._point.counts(call):
                return False
            self._is_live = False
            return not os.path.exists(os.environ[FIRED])  # An earlier child may have fired it.

    async def _act_before_the_answer(self, call: Any) -> Any:
        server = "postgres" if self._point.statement else "broker"
        ask(f"hold {server} {self._point.statement}")
        calling = asyncio.ensure_future(call)
        # The call continues on this loop, so waiting for its answer must not block the loop.
        await asyncio.to_thread(ask, f"answered {server}")
        if self._action not in ("exit", f"cut-{server}"):
            ask(f"release {server}")
        self._act()
        return await calling

    def _act(self) -> None:
        """
        Perform the action synchronously in this thread: no other code runs in between.
        """
        if not self._note():
            return
        match self._action:
            case "exit":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "raise":
                raise Planted(f"{self._point.name} fails as it was told to.")
            case cut:
                ask(cut.replace("-", " "))

    def _note(self) -> bool:
        line = f"{time.monotonic()} {os.getpid()} {self._point.name} {self._action}\n"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
            file = os.open(os.environ[FIRED], flags, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        return True


class Planted(Exception):
    """
    An error that no code expects.
    """


def ask(order: str) -> None:
    """
    Send the test an order for this process's wires; return when it has been carried out.
    """
    port = int(os.environ[CONTROL])
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS_MAX) as line:
        line.sendall(f"{order}\n".encode())
        if line.recv(16) != b"done\n":
            raise RuntimeError(f"The test could not {order!r}.")


def has_fired() -> bool:
    """
    Whether the failpoint has fired, as far as this process can know. A replacement process counts
    it as fired, because that is why it was started.
    """
    return FIRED not in os.environ or os.path.exists(os.environ[FIRED])


def plant_from_environment(*, in_child: bool) -> None:
    """
    Plant the failpoint that `process` was given, if it is meant for this process.
    """
    point = FAILPOINTS.get(os.environ.get(POINT, ""))
    if point is not None and in_child == (point.role == "child"):
        point.plant(os.environ[ACTION])


def is_child() -> bool:
    """
    Whether this process is a child that a worker started for its handlers.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == CHILD


# Which call is the intended one


def ends(event: str) -> Callable[[Call], bool]:
    """
    The call settles an attempt with this event.
    """

    def settles(call: Call) -> bool:
        return any(settling.settlement.event == event for settling in call.arguments[1])

    return settles


def notes(what: str) -> Callable[[Call], bool]:
    """
    The call is the handler's note that it starts, or ends.
    """
    return lambda call: bool(call.arguments[1] == what)


def tells(what: str) -> Callable[[Call], bool]:
    """
    The call is this message from a child.
    """
    return lambda call: bool(call.arguments[1]["tell"] == what)


def handler_runs(call: Call) -> bool:
    """
    A handler has already started.
    """
    return os.path.getsize(os.environ["ASYNCFLOW_TEST_JOURNAL"]) > 0


# The steps


def _step(part: str, step: str, target: str, whens: str, **more: Any) -> list[Failpoint]:
    name = {"before": "{}.before-{}", "after": "{}.after-{}", "unread": "{}.{}-unread"}
    return [
        Failpoint(name[when].format(part, step), ROLES[part], target, when, **more)
        for when in whens.split()
    ]


ROLES = {
    "api": "api",
    "relay": "maintenance",
    "unqueuer": "maintenance",
    "worker": "worker",
    "loop": "worker",
    "thread": "worker",
    "child": "child",
    "reaper": "maintenance",
    "expirer": "maintenance",
    "pruner": "maintenance",
}
"""The kind of process that runs each part; handlers run in `loop`, `thread` and `child`."""

SUBMIT = "asyncflow.store.submit"
STEER = "asyncflow.store.steer"
CLAIMS = "asyncflow.store.claims"
DUE = "asyncflow.store.due"
SETTLE = "asyncflow.store.settle"
HINTS = "asyncflow.store.hints"
UPKEEP = "asyncflow.store.upkeep"
WORKERS = "asyncflow.store.workers"
CHANNEL = "asyncflow.transport.amqp.channel"
NOTE = "tests.faults.handlers:note"

RUNNING, PENDING = "SET state = 'running'", "SET state = 'pending'"
QUEUED, COMPLETED, CANCELLED = (
    "SET state = 'queued'",
    "SET state = 'completed'",
    "SET state = 'cancelled'",
)
RETRIED, RELEASED = "generation, 'retried'", "generation, 'released'"

ALL, ENDS = "before unread after", "before unread"

_STEPS = [
    # A submission
    _step(
        *("api", "commit", f"{SUBMIT}:submit", ALL),
        story="submission",
        statement="INSERT INTO asyncflow.tasks",
    ),
    _step(
        *("api", "answer", "asyncflow.api.routes.submissions:_send_accepted", "before"),
        story="submission",
    ),
    _step(*("api", "wake-up", "asyncflow.store.wakeups:send_wakeup", "before"), story="submission"),
    # Its hint
    _step("relay", "admissible", f"{DUE}:admissible", "after"),
    _step("relay", "confirm", f"{CHANNEL}:Channel.publish", "unread after"),
    _step("relay", "mark", f"{HINTS}:mark_queued", "unread after", statement=QUEUED),
    _step(
        *("relay", "unqueue", f"{HINTS}:unqueue_lost", ALL),
        story="lost hint",
        statement=PENDING,
    ),
    _step(
        *("unqueuer", "unqueue", f"{HINTS}:unqueue_stranded", ALL),
        story="lost hint",
        statement=PENDING,
    ),
    _step(
        "worker",
        "delivery",
        "asyncflow.transport.rabbitmq.consumer:Consumer._receive",
        "before",
    ),
    # Its claim
    _step("worker", "due-claim", f"{CLAIMS}:claim_due", ALL, statement=RUNNING),
    _step("worker", "hinted-claim", f"{CLAIMS}:claim_hinted", ALL, statement=RUNNING),
    # Its attempt
    _step("worker", "start", "asyncflow.worker.isolation.isolation:Isolation.prepare", "before"),
    _step("loop", "start", NOTE, "after", counts=notes("start")),
    _step("loop", "end", NOTE, "after", counts=notes("end")),
    _step("thread", "start", NOTE, "after", counts=notes("start"), handler="step-in-thread"),
    _step("child", "start", NOTE, "after", counts=notes("start"), handler="step-in-process"),
    _step("child", "end", NOTE, "after", counts=notes("end"), handler="step-in-process"),
    _step(
        *("worker", "child-start", "asyncflow.worker.isolation.child:Child._receive", "after"),
        counts=tells("started"),
        handler="step-in-process",
    ),
    _step("worker", "run", "asyncflow.worker.isolation.loop:LoopRun.outcome", "before after"),
    _step("worker", "outcome", "asyncflow.worker.attempt:Attempt.decide", "before"),
    _step("worker", "decision", "asyncflow.worker.attempt:decide", "before"),
    _step(
        *("worker", "beat", f"{WORKERS}:heartbeat", ENDS),
        story="a while",
        counts=handler_runs,
        statement="UPDATE asyncflow.workers",
    ),
    # Its settlement
    _step(
        *("worker", "settle", f"{SETTLE}:settle", ALL),
        counts=ends("complete"),
        statement=COMPLETED,
    ),
    _step("worker", "ack", f"{CHANNEL}:Channel.ack", "before after"),
    _step(
        *("worker", "retry", f"{SETTLE}:settle", ALL),
        story="failure",
        counts=ends("retry"),
        statement=RETRIED,
    ),
    _step(
        *("worker", "release", f"{SETTLE}:settle", ALL),
        story="shutdown",
        counts=ends("release"),
        statement=RELEASED,
    ),
    # Its cancellation
    _step(
        *("api", "flag", f"{STEER}:cancel", "unread after"),
        story="cancellation",
        statement="SET cancel_requested_at = coalesce",
    ),
    _step(
        *("worker", "cancel", f"{SETTLE}:settle", ENDS),
        story="stop",
        counts=ends("cancel"),
        statement=CANCELLED,
    ),
    # What maintenance does for it
    _step("reaper", "declare", f"{WORKERS}:mark_lost", "after", story="dead worker"),
    _step("reaper", "select", f"{UPKEEP}:lost_leases", "after", story="dead worker"),
    _step(
        *("reaper", "settle", f"{SETTLE}:settle", "unread after"),
        story="dead worker",
        statement=RETRIED,
    ),
    _step("expirer", "expire", f"{UPKEEP}:expire", ALL, story="expiry", statement=CANCELLED),
    _step(
        *("pruner", "prune", f"{UPKEEP}:prune_finished", ALL),
        story="old task",
        statement="DELETE FROM asyncflow.tasks",
    ),
]

FAILPOINTS = {point.name: point for points in _STEPS for point in points}
