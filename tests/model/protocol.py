"""
The protocol as a machine of named steps: tasks, workers, hints, the relay and the reaper.

A `World` is everything that matters at one moment, and `Protocol.steps` lists all that can happen
next. A statement in PostgreSQL is atomic, so it is one step. Anything that can happen between two
statements is a step of its own: an answer in flight, a message held by a worker, a reaper that has
read and not yet written. Time is not modelled. What waits for time (a retry's delay, an overdue
heartbeat) may happen in every state in which it may happen at all, so the order of steps never
depends on how long something takes.

Three kinds of steps:

- progress, which happens on its own when nothing goes wrong;
- requests: cancel, redrive, pause, and deadlines that pass;
- faults: crashes, frozen and hanging processes, lost answers, messages and memory.

Faults and requests are rationed, so that the number of worlds is finite. Not modelled: hints in
packs, priorities, more than one queue, and pruning, after which no statement finds the task.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from typing import NamedTuple, TypeVar

from asyncflow.domain.outcome import (
    Cancelled,
    Completed,
    Crashed,
    Failed,
    Failure,
    Outcome,
    Released,
    decide,
)
from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import LIVE, Event, State
from tests.model.statements import NOBODY, Row, Statements

WINDOW = 1
"""Ready messages up to which the relay sends more."""

WORKERS = 2
GONE = -1
"""
The owner of a row whose worker has been replaced. Real ids are fresh at every start; here the new
worker reuses the old one's number, so the old one's rows get an owner it does not know.
"""

NOTHING = -1

T = TypeVar("T")


class Kind(StrEnum):
    """
    Why a step happens.
    """

    PROGRESS = "progress"
    REQUEST = "request"
    FAULT = "fault"


class Process(StrEnum):
    """
    A worker's process, and what the database believes about it.
    """

    WORKS = "works"
    """It works and sends heartbeats."""

    HANGS = "hangs"
    """Its event loop is blocked. Its heartbeats have their own thread and continue."""

    IS_FROZEN = "is frozen"
    """The whole process is suspended, including heartbeats; it may wake up."""

    CRASHED = "crashed"
    """It is dead, and the database does not know yet."""

    IS_FROZEN_AND_LOST = "is frozen and lost"
    """It is suspended and was declared lost."""

    IS_LOST = "is lost"
    """It woke up and continues, unaware that it was declared lost: a zombie."""


ACTS = frozenset({Process.WORKS, Process.IS_LOST})
IS_REGISTERED = frozenset({Process.WORKS, Process.HANGS, Process.IS_FROZEN, Process.CRASHED})
IS_SILENT = frozenset({Process.HANGS, Process.IS_FROZEN, Process.IS_FROZEN_AND_LOST})


class Worker(NamedTuple):
    """
    One of the workers, or its replacement.

    Attributes:
        inbox: The task whose hint was delivered but not yet examined, or NOTHING.
    """

    process: Process = Process.WORKS
    inbox: int = NOTHING


ANSWER = "answer"
RUNS = "runs"


class Attempt(NamedTuple):
    """
    A claim in a worker's memory.

    Attributes:
        place: The worker's number.
        phase: ANSWER if the claim's answer is in flight, RUNS if its handler runs, or the event it
            settles as.
        hinted: Whether its message is still unacknowledged.
        failures: The number reported by the claim's answer.
    """

    task: int
    lease: int
    place: int
    phase: str
    hinted: bool
    failures: int


class Reaping(NamedTuple):
    """
    A lost lease that the reaper has read, and how it will settle it.
    """

    lease: int
    event: Event


class World(NamedTuple):
    """
    Everything at one moment.

    Attributes:
        attempts: In order, so that equal worlds are equal.
        ready: Per task, the number of hints that RabbitMQ holds ready.
        sent: Per task, the number of attempts at which the relay sent a hint that it has not marked
            yet, or NOTHING.
        faults, requests: The number that may still happen.
    """

    rows: tuple[Row, ...]
    workers: tuple[Worker, ...]
    attempts: tuple[Attempt, ...]
    ready: tuple[int, ...]
    sent: tuple[int, ...]
    reaping: tuple[Reaping | None, ...]
    paused: bool
    faults: int
    requests: int


class Step(NamedTuple):
    """
    Something that can happen.

    Attributes:
        text: A sentence with a placeholder for each of `names`.
        lease: The lease under which it writes, 0 if it needs none.
    """

    kind: Kind
    text: str
    names: tuple[object, ...]
    after: World
    lease: int = 0

    def __str__(self) -> str:
        return self.text.format(*self.names)


_FAILURE = Failure("ValueError", "It did not work.")


COMPLETED = Completed("null")
FAILED = Failed(_FAILURE)
CRASHED = Crashed(_FAILURE)
CANCELLED = Cancelled(_FAILURE)
RELEASED = Released()


@cache
def event_of(outcome: Outcome, failures: int, max_attempts: int) -> Event:
    """
    The product's decision, made by its own pure function.
    """
    return decide(
        outcome, failures=failures, max_attempts=max_attempts, backoff=Backoff(), random=0.0
    ).event


class Protocol(Statements):
    """
    All that can happen. A mistake is a subclass that overrides one method.

    Args:
        tasks: Number of tasks, all just submitted.
        max_attempts: Of every task.
        offers: Per worker, the tasks whose names it offers; None means all, for every worker.
        faults, requests: The number that may happen, in any order and combination.
    """

    def __init__(
        self,
        *,
        tasks: int,
        faults: int,
        requests: int,
        max_attempts: int = 2,
        offers: tuple[frozenset[int], ...] | None = None,
    ) -> None:
        self.tasks = range(tasks)
        self.places = range(WORKERS)
        self.offers = offers or (frozenset(self.tasks),) * WORKERS
        self._max_attempts = max_attempts
        self._faults = faults
        self._requests = requests

    def start(self) -> World:
        """
        Every task is stored, every worker is alive, and nothing has happened.
        """
        count = len(self.tasks)
        return World(
            rows=(Row(max_attempts=self._max_attempts),) * count,
            workers=(Worker(),) * WORKERS,
            attempts=(),
            ready=(0,) * count,
            sent=(NOTHING,) * count,
            reaping=(None,) * count,
            paused=False,
            faults=self._faults,
            requests=self._requests,
        )

    def steps(self, world: World) -> Iterator[Step]:
        """
        Everything that can happen next.
        """
        for task in self.tasks:
            yield from self.relay(world, task)
            yield from self.maintenance(world, task)
        for place in self.places:
            yield from self.worker(world, place)
        for attempt in world.attempts:
            yield from self.attempt(world, attempt)
        if world.paused:
            yield progress("the queue is resumed", (), world._replace(paused=False))
        if world.requests:
            yield from self.people(world._replace(requests=world.requests - 1))
        if world.faults:
            yield from self.faults(world._replace(faults=world.faults - 1))

    def canonical(self, world: World) -> World:
        """
        The representative of all worlds that differ only in the numbering of equal workers.
        """
        if len(set(self.offers)) > 1 or world.workers[0] < world.workers[1]:
            return world
        swapped = World(
            rows=tuple(
                row._replace(owner=WORKERS + 1 - row.owner) if row.owner > NOBODY else row
                for row in world.rows
            ),
            workers=world.workers[::-1],
            attempts=tuple(sorted(a._replace(place=WORKERS - 1 - a.place) for a in world.attempts)),
            ready=world.ready,
            sent=world.sent,
            reaping=world.reaping,
            paused=world.paused,
            faults=world.faults,
            requests=world.requests,
        )
        return min(world, swapped, key=_names)

    def is_at_rest(self, world: World) -> bool:
        """
        Every task has ended, and no process holds or remembers any unfinished work.
        """
        return (
            not world.attempts
            and not any(world.ready)
            and all(row.state not in LIVE for row in world.rows)
            and all(worker.inbox == NOTHING for worker in world.workers)
            and all(sent == NOTHING for sent in world.sent)
            and all(reaping is None for reaping in world.reaping)
        )

    # The relay

    def relay(self, world: World, task: int) -> Iterator[Step]:
        """
        Publish, then mark; and find tasks whose hint was lost.
        """
        row = world.rows[task]
        is_open = not world.paused and self.is_offered(world, task)
        sent = world.sent[task]
        if sent != NOTHING:
            marked = self.mark_queued(row, attempt=sent)
            after = with_row(with_sent(world, task, NOTHING), task, marked)
            yield progress("the relay marks task {} as queued", (task,), after)
        if (
            is_open
            and self.is_admissible(row)
            and sent != row.attempt
            and sum(world.ready) < WINDOW
        ):
            after = with_sent(with_ready(world, task, +1), task, row.attempt)
            yield progress("the relay publishes a hint of task {}", (task,), after)
        if is_open and row.state is State.QUEUED and self.knows_hints_are_lost(world):
            after = with_row(world, task, self.unqueue(row))
            yield progress("the relay finds that the hint of task {} is lost", (task,), after)

    def is_offered(self, world: World, task: int) -> bool:
        """
        Whether a worker that the database believes alive can run the task.
        """
        return any(
            worker.process in IS_REGISTERED and task in self.offers[place]
            for place, worker in enumerate(world.workers)
        )

    def knows_hints_are_lost(self, world: World) -> bool:
        """
        Whether more tasks are queued than there are messages. Messages held by a worker do not
        count as ready, so this is a guess, and must be harmless if wrong.
        """
        return sum(row.state is State.QUEUED for row in world.rows) > sum(world.ready)

    # The reaper and the rest of maintenance

    def maintenance(self, world: World, task: int) -> Iterator[Step]:
        """
        The reaper reads, and writes later; the expirer does both in one step.
        """
        row = world.rows[task]
        if row.state is State.RUNNING and not self.is_alive(world, row.owner):
            outcome: Outcome = CANCELLED if row.cancel_requested else CRASHED
            event = event_of(outcome, row.failures, row.max_attempts)
            reaping = Reaping(row.lease, event)
            if world.reaping[task] != reaping:
                after = _with_reaping(world, task, reaping)
                yield progress(
                    "the reaper sees that worker {} lost task {}", (row.owner, task), after
                )
        if (seen := world.reaping[task]) is not None:
            reaped = self.reap(row, seen)
            after = with_row(_with_reaping(world, task, None), task, reaped)
            yield progress("the reaper settles task {}: {}", (task, seen.event), after, seen.lease)
        if row.expired and row.state in LIVE:
            yield progress("task {} expires", (task,), with_row(world, task, self.expire(row)))
        if not row.due and row.state is State.PENDING:
            after = with_row(world, task, row._replace(due=True))
            yield progress("task {} becomes due", (task,), after)

    def is_alive(self, world: World, owner: int) -> bool:
        """
        Whether the owner is neither stopped nor declared lost.
        """
        return owner != GONE and world.workers[owner - 1].process in IS_REGISTERED

    def reap(self, row: Row, seen: Reaping) -> Row:
        """
        Settle by the same fenced statement that workers use.
        """
        return self.settle(row, lease=seen.lease, event=seen.event)

    # A worker's process

    def worker(self, world: World, place: int) -> Iterator[Step]:
        """
        Take in hints, check the leases, end, start again.
        """
        process, names = world.workers[place].process, (place + 1,)
        if process in ACTS:
            yield from self.take_in(world, place)
        if process is Process.WORKS:
            yield from self.release_orphans(world, place)
        elif process is Process.HANGS:
            yield from self.notice_stall(world, place)
        elif process is Process.CRASHED:
            after = self.replace(world, place)
            yield progress("worker {} is declared lost and replaced", names, after)
        elif process is Process.IS_FROZEN:
            after = _with_process(world, place, Process.WORKS)
            yield progress("worker {} wakes up", names, after)
            after = _with_process(world, place, Process.IS_FROZEN_AND_LOST)
            yield progress("worker {} is declared lost", names, after)
        elif process is Process.IS_FROZEN_AND_LOST:
            after = _with_process(world, place, Process.IS_LOST)
            yield progress("worker {} wakes up", names, after)
        elif process is Process.IS_LOST:
            after = self.replace(_drop_attempts(world, place), place)
            yield progress("worker {} learns that it is lost, and is replaced", names, after)
        if process in IS_SILENT and _holds_messages(world, place):
            after = _return_messages(world, place)
            yield progress("RabbitMQ hears nothing of worker {}", names, after)

    def take_in(self, world: World, place: int) -> Iterator[Step]:
        """
        A hint is delivered; it leads to a claim, or is released.
        """
        worker = world.workers[place]
        if worker.inbox == NOTHING:
            for task in self.tasks:
                if world.ready[task]:
                    after = with_ready(world, task, -1)
                    after = _with_worker(after, place, worker._replace(inbox=task))
                    yield progress("worker {} gets a hint of task {}", (place + 1, task), after)
            return
        task = worker.inbox
        row = world.rows[task]
        emptied = _with_worker(world, place, worker._replace(inbox=NOTHING))
        claimed = row
        if task in self.offers[place]:
            claimed = self.claim_hinted(row, worker=place + 1, paused=world.paused)
        if claimed is not row:
            yield progress(
                "worker {} claims task {} under lease {}",
                (place + 1, task, claimed.lease),
                self.claimed(emptied, task, claimed, place),
            )
        else:
            if task not in self.offers[place]:
                emptied = with_row(emptied, task, self.decline(row))
            after = self.after_no_claim(emptied, task)
            yield progress("worker {} lets a hint of task {} go", (place + 1, task), after)

    def claimed(self, world: World, task: int, row: Row, place: int) -> World:
        """
        The world after a claim: the row is running, and the answer is in flight to the worker.
        """
        attempt = Attempt(task, row.lease, place, ANSWER, True, row.failures)
        return _with_attempt(with_row(world, task, row), attempt)

    def after_no_claim(self, world: World, task: int) -> World:
        """
        A hint that claimed nothing is acknowledged for any reason, and never requeued.
        """
        return world

    def release_orphans(self, world: World, place: int) -> Iterator[Step]:
        """
        Release tasks that the database says this worker holds and that the worker does not know: a
        claim whose answer was lost, or an attempt that it abandoned when it fenced itself.
        """
        for task, row in enumerate(world.rows):
            if row.state is State.RUNNING and row.owner == place + 1:
                if not any(a.task == task and self.is_known(a, row, place) for a in world.attempts):
                    settled = self.settle(row, lease=row.lease, event=Event.RELEASE)
                    yield progress(
                        "worker {} releases task {}, of which it knows nothing",
                        (place + 1, task),
                        with_row(world, task, settled),
                        row.lease,
                    )

    def is_known(self, attempt: Attempt, row: Row, place: int) -> bool:
        """
        Whether the worker has the lease, or waits for the answer that brings it.
        """
        return attempt.lease == row.lease and attempt.place == place

    def notice_stall(self, world: World, place: int) -> Iterator[Step]:
        """
        End the process: a hanging loop whose heartbeats continue would keep its leases for as long
        as the process lives.
        """
        yield progress("worker {} ends itself: it hangs", (place + 1,), _crash(world, place))

    def replace(self, world: World, place: int) -> World:
        """
        Start another worker under a fresh id. RabbitMQ gets back what it had sent to the old one.
        """
        rows = tuple(
            row._replace(owner=GONE) if row.owner == place + 1 else row for row in world.rows
        )
        world = _return_messages(world, place)
        return _with_worker(world, place, Worker())._replace(rows=rows)

    # An attempt

    def attempt(self, world: World, attempt: Attempt) -> Iterator[Step]:
        """
        Its answer arrives, its handler ends, it settles.
        """
        if world.workers[attempt.place].process not in ACTS:
            return
        task, row = attempt.task, world.rows[attempt.task]
        names: tuple[object, ...] = (attempt.place + 1, task)
        if attempt.phase == ANSWER:
            after = _with_phase(world, attempt, RUNS)
            yield progress("worker {} starts the handler of task {}", names, after)
        elif attempt.phase == RUNS:
            after = _ended(world, attempt, COMPLETED)
            yield progress("worker {} completes the handler of task {}", names, after)
            after = _ended(world, attempt, FAILED)
            yield progress("worker {} sees the handler of task {} fail", names, after)
            if row.cancel_requested and row.lease == attempt.lease:
                after = _ended(world, attempt, CANCELLED)
                yield progress("worker {} stops the handler of task {}", names, after)
        else:
            settled = self.settle(row, lease=attempt.lease, event=Event(attempt.phase))
            written = with_row(world, task, settled)
            names = (*names, attempt.phase, attempt.lease)
            yield progress(
                "worker {} settles task {}: {} under lease {}",
                names,
                _without_attempt(written, attempt),
                attempt.lease,
            )
            if world.faults and settled is not row:
                yield Step(
                    Kind.FAULT,
                    "worker {} settles task {}: {} under lease {}, and hears no answer",
                    names,
                    written._replace(faults=world.faults - 1),
                    attempt.lease,
                )

    # Requests and the clock

    def people(self, world: World) -> Iterator[Step]:
        """
        Requests and deadlines.
        """
        for task, row in enumerate(world.rows):
            cancelled = self.cancel(row)
            if cancelled is not row:
                yield _request("task {} is cancelled", task, with_row(world, task, cancelled))
            redriven = self.redrive(row)
            if redriven is not row:
                yield _request("task {} is redriven", task, with_row(world, task, redriven))
            if row.state in LIVE and not row.expired:
                after = with_row(world, task, row._replace(expired=True))
                yield _request("the deadline of task {} passes", task, after)
        if not world.paused:
            yield _request("the queue is paused", None, world._replace(paused=True))

    # Faults

    def faults(self, world: World) -> Iterator[Step]:
        """
        Everything that may go wrong.
        """
        for place, worker in enumerate(world.workers):
            yield from self.faults_of_a_worker(world, place, worker)
        for attempt in world.attempts:
            yield from self.faults_of_an_attempt(world, attempt)
        yield from self.faults_of_the_broker(world)
        yield from self.faults_of_the_relay(world)

    def faults_of_a_worker(self, world: World, place: int, worker: Worker) -> Iterator[Step]:
        """
        The worker dies, hangs in one of two ways, or stops trusting its leases.
        """
        names = (place + 1,)
        if worker.process is Process.WORKS:
            yield _fault("worker {} crashes", names, _crash(world, place))
            after = _with_process(world, place, Process.IS_FROZEN)
            yield _fault("worker {} freezes", names, after)
            after = _with_process(world, place, Process.HANGS)
            yield _fault("worker {} hangs, but beats", names, after)
        if worker.process in ACTS and any(a.place == place for a in world.attempts):
            after = _drop_attempts(world, place)
            yield _fault("worker {} fences itself", names, after)
        if _holds_messages(world, place):
            after = _return_messages(world, place)
            yield _fault("worker {} loses its connection to RabbitMQ", names, after)

    def faults_of_an_attempt(self, world: World, attempt: Attempt) -> Iterator[Step]:
        """
        The claim's answer is lost, or the attempt is put back because its worker stops.
        """
        if world.workers[attempt.place].process not in ACTS:
            return
        names = (attempt.place + 1, attempt.task)
        if attempt.phase == ANSWER:
            after = _without_attempt(world, attempt)
            if attempt.hinted:
                after = with_ready(after, attempt.task, +1)
            yield _fault("worker {} gets no answer to its claim of task {}", names, after)
        elif attempt.phase == RUNS:
            after = _ended(world, attempt, RELEASED)
            yield _fault("worker {} gives task {} back", names, after)

    def faults_of_the_broker(self, world: World) -> Iterator[Step]:
        """
        Hints are lost and duplicated.
        """
        for task in self.tasks:
            if world.ready[task]:
                lost, doubled = with_ready(world, task, -1), with_ready(world, task, +1)
                yield _fault("RabbitMQ loses a hint of task {}", (task,), lost)
                yield _fault("RabbitMQ doubles a hint of task {}", (task,), doubled)

    def faults_of_the_relay(self, world: World) -> Iterator[Step]:
        """
        The relay never marks a hint that it sent, so another relay, or the same one on a new
        connection, sends it again.
        """
        if any(sent != NOTHING for sent in world.sent):
            after = world._replace(sent=(NOTHING,) * len(self.tasks))
            yield _fault("the relay crashes before it has marked what it sent", (), after)


class WithoutBroker(Protocol):
    """
    The protocol without RabbitMQ: no relay and no hints.
    """

    def relay(self, world: World, task: int) -> Iterator[Step]:
        """
        Nothing: there is no relay.
        """
        return iter(())

    def take_in(self, world: World, place: int) -> Iterator[Step]:
        """
        A worker claims whatever is due.
        """
        for task in self.offers[place]:
            row = world.rows[task]
            claimed = self.claim_due(row, worker=place + 1, paused=world.paused)
            if claimed is not row:
                after = self.claimed(world, task, claimed, place)
                yield progress("worker {} claims task {}", (place + 1, task), after)

    def claimed(self, world: World, task: int, row: Row, place: int) -> World:
        """
        The world after a claim, which came without a message.
        """
        attempt = Attempt(task, row.lease, place, ANSWER, False, row.failures)
        return _with_attempt(with_row(world, task, row), attempt)


def _names(world: World) -> tuple[object, ...]:
    return world.workers, world.attempts, world.rows


class OnlyMessagesGetLost(Protocol):
    """
    The protocol with workers that never fail, to examine hints alone.
    """

    def faults(self, world: World) -> Iterator[Step]:
        """
        Faults of RabbitMQ and of the relay.
        """
        yield from self.faults_of_the_broker(world)
        yield from self.faults_of_the_relay(world)


def progress(text: str, names: tuple[object, ...], after: World, lease: int = 0) -> Step:
    return Step(Kind.PROGRESS, text, names, after, lease)


def _request(text: str, task: int | None, after: World) -> Step:
    return Step(Kind.REQUEST, text, (task,), after)


def _fault(text: str, names: tuple[object, ...], after: World) -> Step:
    return Step(Kind.FAULT, text, names, after)


# Worlds that differ from another in one respect


def with_row(world: World, task: int, row: Row) -> World:
    return world._replace(rows=_replaced(world.rows, task, row))


def _with_worker(world: World, place: int, worker: Worker) -> World:
    return world._replace(workers=_replaced(world.workers, place, worker))


def _with_process(world: World, place: int, process: Process) -> World:
    return _with_worker(world, place, world.workers[place]._replace(process=process))


def with_ready(world: World, task: int, change: int) -> World:
    return world._replace(ready=_replaced(world.ready, task, world.ready[task] + change))


def with_sent(world: World, task: int, sent: int) -> World:
    return world._replace(sent=_replaced(world.sent, task, sent))


def _with_reaping(world: World, task: int, reaping: Reaping | None) -> World:
    return world._replace(reaping=_replaced(world.reaping, task, reaping))


def _with_attempt(world: World, attempt: Attempt) -> World:
    return world._replace(attempts=tuple(sorted((*world.attempts, attempt))))


def _without_attempt(world: World, attempt: Attempt) -> World:
    return world._replace(attempts=tuple(a for a in world.attempts if a is not attempt))


def _with_phase(world: World, attempt: Attempt, phase: str) -> World:
    return _with_attempt(_without_attempt(world, attempt), attempt._replace(phase=phase))


def _ended(world: World, attempt: Attempt, outcome: Outcome) -> World:
    max_attempts = world.rows[attempt.task].max_attempts
    return _with_phase(world, attempt, event_of(outcome, attempt.failures, max_attempts))


def _drop_attempts(world: World, place: int) -> World:
    """
    The worker's attempts are void: nothing is written, and their hints are released.
    """
    return world._replace(attempts=tuple(a for a in world.attempts if a.place != place))


def _holds_messages(world: World, place: int) -> bool:
    if world.workers[place].inbox != NOTHING:
        return True
    return any(a.hinted and a.place == place for a in world.attempts)


def _return_messages(world: World, place: int) -> World:
    """
    The worker's connection broke: its unacknowledged messages are ready in RabbitMQ again.
    """
    ready, attempts = list(world.ready), []
    worker = world.workers[place]
    if worker.inbox != NOTHING:
        ready[worker.inbox] += 1
        world = _with_worker(world, place, worker._replace(inbox=NOTHING))
    for attempt in world.attempts:
        returned = attempt.hinted and attempt.place == place
        ready[attempt.task] += returned
        attempts.append(attempt._replace(hinted=False) if returned else attempt)
    return world._replace(ready=tuple(ready), attempts=tuple(sorted(attempts)))


def _crash(world: World, place: int) -> World:
    world = _drop_attempts(_return_messages(world, place), place)
    return _with_process(world, place, Process.CRASHED)


def _replaced(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
