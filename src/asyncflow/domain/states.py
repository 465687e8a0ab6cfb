"""
The states of a task and every legal transition between them.

Everything that decides whether a task may move lives here. Who moves it, when and why does
not. It is data first, and the few lines that read the data.

Transitions are performed by guarded statements in `store/`, some by several:
``UPDATE tasks … WHERE state = <from> [AND lease_id = <mine>]``. A statement that finds the row
in another state changes nothing, so a late, repeated or forged caller is harmless.

`running` is the only state with a lease. Every statement that moves a task out of `running`
names the lease it was claimed under, the reaper's too. The terminal states change only by an
explicit redrive, which starts a new generation of the same task.

`SCHEDULED` and `RETRYING` are not states but names for a pending task with a future `run_at`;
`display_status` derives them.
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
    short tasks that a worker claims right away.
    """

    RUNNING = "running"
    """Claimed by one worker, under one lease."""

    COMPLETED = "completed"
    """The handler returned; the result is recorded. Terminal."""

    FAILED = "failed"
    """A dead letter: attempts used up, rejected, or not retryable. Terminal until redriven."""

    CANCELLED = "cancelled"
    """Cancelled by request, or expired while it waited. Terminal until redriven."""


class Event(StrEnum):
    """
    Why a task changes its state.
    """

    QUEUE = "queue"
    """The relay published its id and RabbitMQ confirmed it."""

    UNQUEUE = "unqueue"
    """Its hint was lost, or reached a worker that cannot run it."""

    CLAIM = "claim"
    """A worker took it for one attempt, under a new lease."""

    COMPLETE = "complete"
    """The handler returned."""

    FAIL = "fail"
    """The attempt failed for good."""

    RETRY = "retry"
    """The attempt failed, or its worker died; another one is due later."""

    RELEASE = "release"
    """The attempt ended without a result or a failure, for example at shutdown."""

    CANCEL = "cancel"
    """A cancellation was requested; a running attempt has stopped."""

    EXPIRE = "expire"
    """Its `expires_at` passed before it started."""

    REDRIVE = "redrive"
    """An operator started a new generation of a failed or cancelled task."""


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
