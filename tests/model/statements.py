"""
What each statement of the store does to one task's row, as far as the protocol cares.

This is the store without SQL: the guards of `store/submit`, `due`, `claims`, `settle`, `steer`,
`hints` and `upkeep`, one method each. Where a row may move is not decided here; every method asks
the table of `domain/states`. The methods are used twice: `protocol` explores everything
that can happen with them, and `store/test_model` compares them with PostgreSQL.
"""

from __future__ import annotations

from typing import NamedTuple

from asyncflow.domain.states import TERMINAL, TRANSITIONS, Event, State

NOBODY = 0
NO_LEASE = 0


class Row(NamedTuple):
    """
    A task's row. Columns that no longer matter once the task has finished are reset.

    Attributes:
        attempt: Number of claims.
        failures: Failures charged by the retry policy in this generation.
        lease: The lease of its latest claim, identified by the attempt's number, so no two claims
            of a task share one. 0 if the task waits. A finished task keeps its last one.
        owner: The worker that holds the lease of a running task, otherwise 0.
        cancel_requested: Whether the cancellation of a live task was requested.
        due: Whether the `run_at` of a live task has come.
        expired: Whether the `expires_at` of a live task has passed.
        max_attempts: The number of failures that ends the task.
    """

    state: State = State.PENDING
    generation: int = 1
    attempt: int = 0
    failures: int = 0
    lease: int = NO_LEASE
    owner: int = NOBODY
    cancel_requested: bool = False
    due: bool = True
    expired: bool = False
    max_attempts: int = 2


class IllegalMove(Exception):
    """
    A statement moved a row along an arrow that is not in the table.
    """


def moved(row: Row, event: Event) -> Row:
    """
    The row after `event`, as the table says.

    Raises:
        IllegalMove: The table has no such arrow. Guarded statements never ask for one.
    """
    state = TRANSITIONS[row.state].get(event)
    if state is None:
        raise IllegalMove(f"{row.state} has no way out by {event}")
    if state in TERMINAL:
        return row._replace(
            state=state, owner=NOBODY, cancel_requested=False, due=True, expired=False
        )
    return row._replace(state=state)


def waits(row: Row) -> bool:
    """
    Whether the task is pending or queued.
    """
    return row.state is State.PENDING or row.state is State.QUEUED


class Statements:
    """
    Each method returns the resulting row: the same object if its guard matched nothing.
    """

    def may_be_claimed(self, row: Row, *, paused: bool) -> bool:
        """
        The guard of CLAIM_HINTED.
        """
        return waits(row) and row.due and not row.expired and not paused

    def claim_hinted(self, row: Row, *, worker: int, paused: bool) -> Row:
        """
        CLAIM_HINTED: a hint may find a task pending, before the relay has marked it.
        """
        if not self.may_be_claimed(row, paused=paused):
            return row
        lease = row.attempt + 1
        return moved(row, Event.CLAIM)._replace(attempt=lease, lease=lease, owner=worker)

    def claim_due(self, row: Row, *, worker: int, paused: bool) -> Row:
        """
        CLAIM_DUE: the same without a hint, for tasks that have none in RabbitMQ.
        """
        if row.state is not State.PENDING:
            return row
        return self.claim_hinted(row, worker=worker, paused=paused)

    def holds(self, row: Row, lease: int) -> bool:
        """
        The fence: ``state = 'running' AND lease_id = …``.
        """
        return row.state is State.RUNNING and row.lease == lease

    def settle(self, row: Row, *, lease: int, event: Event) -> Row:
        """
        SETTLE_*: out of `running`, under its lease.
        """
        if not self.holds(row, lease):
            return row
        event = self.settled_as(row, event)
        if event is Event.RETRY or event is Event.RELEASE:
            return self.put_back(row, event)
        return moved(row, event)._replace(failures=row.failures + (event is Event.FAIL))

    def settled_as(self, row: Row, event: Event) -> Event:
        """
        The event that is recorded: a retry or release of a task whose cancellation was requested
        cancels it.
        """
        is_put_back = event is Event.RETRY or event is Event.RELEASE
        return Event.CANCEL if is_put_back and row.cancel_requested else event

    def put_back(self, row: Row, event: Event) -> Row:
        """
        A retry charges a failure and waits a while; a release does neither.
        """
        charged = event is Event.RETRY
        return moved(row, event)._replace(
            lease=NO_LEASE,
            owner=NOBODY,
            failures=row.failures + charged,
            due=row.due and not charged,
        )

    def is_admissible(self, row: Row) -> bool:
        """
        The guard of ADMISSIBLE.
        """
        return row.state is State.PENDING and row.due and not row.expired

    def mark_queued(self, row: Row, *, attempt: int) -> Row:
        """
        MARK_QUEUED, for a hint sent after `attempt` attempts. A later attempt has used it up.
        """
        if row.state is not State.PENDING or not row.due or row.attempt != attempt:
            return row
        return moved(row, Event.QUEUE)

    def unqueue(self, row: Row) -> Row:
        """
        UNQUEUE_LOST, for a task whose hint the relay believes lost.
        """
        return moved(row, Event.UNQUEUE) if row.state is State.QUEUED else row

    def decline(self, row: Row) -> Row:
        """
        UNQUEUE: its hint reached a worker that does not offer its name; it is due again later.
        """
        if not waits(row) or not row.due:
            return row
        if row.state is State.QUEUED:
            row = moved(row, Event.UNQUEUE)
        return row._replace(due=False)

    def cancel(self, row: Row) -> Row:
        """
        CANCEL_WAITING, or REQUEST_CANCEL for a running task, which its worker obeys later.
        """
        if waits(row):
            return moved(row, Event.CANCEL)
        if row.state is State.RUNNING and not row.cancel_requested:
            return row._replace(cancel_requested=True)
        return row

    def run_now(self, row: Row) -> Row:
        """
        RUN_NOW: a task that waits for its time is due.
        """
        return row._replace(due=True) if row.state is State.PENDING and not row.due else row

    def expire(self, row: Row) -> Row:
        """
        EXPIRE: only waiting tasks; an attempt that has begun may finish.
        """
        return moved(row, Event.EXPIRE) if waits(row) and row.expired else row

    def redrive(self, row: Row) -> Row:
        """
        REDRIVE: a new generation with a fresh set of attempts and no deadline.
        """
        if row.state is not State.FAILED and row.state is not State.CANCELLED:
            return row
        return moved(row, Event.REDRIVE)._replace(
            generation=row.generation + 1,
            failures=0,
            lease=NO_LEASE,
        )
