"""
The states of a task and every legal transition between them.

Two rules hold this file together. Everything that decides whether a task may move lives
here; and this file does not know who is asking, when, or why. It is data first, and the
few lines that read the data.

Each transition is performed by exactly one guarded statement in `store/`:
``UPDATE tasks … WHERE state = <from> [AND lease_id = <mine>]``. A statement that finds the
row elsewhere changes nothing, so a late, doubled or forged caller is harmless.

`running` is the only state with a lease. Whoever moves a task out of `running` must name
the lease it was claimed under; the reaper, too. The terminal states change only by an
explicit redrive, which opens a new generation of the same task.

`SCHEDULED` and `RETRYING` are not states. They are what people call a pending task whose
`run_at` has not come; `display_status` derives them.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum


class State(StrEnum):
    """
    What a task's row says. Shown to people in capitals.
    """

    PENDING = "pending"
    """Accepted and waiting: for `run_at`, for its turn, or for a worker that offers its name."""

    QUEUED = "queued"
    """
    Admitted: its id is on its way through RabbitMQ. Not used without a broker, and skipped by
    short tasks that a worker takes at once.
    """

    RUNNING = "running"
    """Claimed by one worker under one lease."""

    COMPLETED = "completed"
    """The handler returned; the result is recorded. Terminal."""

    FAILED = "failed"
    """A dead letter: attempts used up, rejected, or not retryable. Terminal until redriven."""

    CANCELLED = "cancelled"
    """Cancelled by request, or expired while it waited. Terminal until redriven."""


class Event(StrEnum):
    """
    Why a task moves.
    """

    QUEUE = "queue"
    """The relay published its id and the broker confirmed."""

    UNQUEUE = "unqueue"
    """Its hint was lost, or reached a worker that cannot run it."""

    CLAIM = "claim"
    """A worker took it for one attempt and its lease began."""

    COMPLETE = "complete"
    """The handler returned."""

    FAIL = "fail"
    """The attempt failed for good."""

    RETRY = "retry"
    """The attempt failed, or its worker died; another one is due later."""

    RELEASE = "release"
    """A worker gave it back unpunished, for example at shutdown."""

    CANCEL = "cancel"
    """A cancellation was asked for and, if it was running, obeyed."""

    EXPIRE = "expire"
    """Its `expires_at` passed while it waited."""

    REDRIVE = "redrive"
    """An operator opened a new generation of a dead letter."""


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.PENDING: {
        Event.QUEUE: State.QUEUED,
        Event.CLAIM: State.RUNNING,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.CANCELLED,
    },
    State.QUEUED: {
        Event.UNQUEUE: State.PENDING,
        Event.CLAIM: State.RUNNING,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.CANCELLED,
    },
    State.RUNNING: {
        Event.COMPLETE: State.COMPLETED,
        Event.FAIL: State.FAILED,
        Event.RETRY: State.PENDING,
        Event.RELEASE: State.PENDING,
        Event.CANCEL: State.CANCELLED,
    },
    State.COMPLETED: {},
    State.FAILED: {
        Event.REDRIVE: State.PENDING,
    },
    State.CANCELLED: {
        Event.REDRIVE: State.PENDING,
    },
}

TERMINAL = frozenset({State.COMPLETED, State.FAILED, State.CANCELLED})
LIVE = frozenset(State) - TERMINAL


def sources(event: Event) -> tuple[State, ...]:
    """
    The states `event` may find a task in, in the order of `State`.
    """
    return tuple(state for state in State if event in TRANSITIONS[state])


def display_status(state: State, *, run_at: datetime, failures: int, now: datetime) -> str:
    """
    The status people see, in capitals.

    A pending task that is not due yet reads `RETRYING` if an attempt of it failed and
    `SCHEDULED` if not; every other task reads as its state.
    """
    if state is State.PENDING and run_at > now:
        return "RETRYING" if failures else "SCHEDULED"
    return state.value.upper()
