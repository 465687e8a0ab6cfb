"""
The rules for every world, and for every change of a row.

They know the table and the contract, but not how the protocol upholds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from asyncflow.domain.states import LIVE, TRANSITIONS, Event, State
from tests.model.protocol import RUNS, Process, World
from tests.model.statements import NO_LEASE, NOBODY, Row

WAITING = (State.PENDING, State.QUEUED)
ARROWS = {(at, to) for at, ways in TRANSITIONS.items() for to in ways.values()}
REDRIVES = {(at, ways[Event.REDRIVE]) for at, ways in TRANSITIONS.items() if Event.REDRIVE in ways}


# In every world


def only_running_has_a_lease(world: World) -> bool:
    """
    A waiting task has no lease, and a running task has exactly one, that of its latest claim.
    """
    return all(
        (row.lease == row.attempt and row.owner != NOBODY)
        if row.state is State.RUNNING
        else row.state not in WAITING or (row.lease, row.owner) == (NO_LEASE, NOBODY)
        for row in world.rows
    )


def failures_are_bounded(world: World) -> bool:
    """
    A task has at most max_attempts failures; once it has that many, it has ended.
    """
    return all(
        row.failures < row.max_attempts
        or (row.failures == row.max_attempts and row.state not in LIVE)
        for row in world.rows
    )


def no_claim_twice(world: World) -> bool:
    """
    No two attempts hold the same lease.
    """
    return len({(a.task, a.lease) for a in world.attempts}) == len(world.attempts)


def what_runs_has_the_lease(world: World) -> bool:
    """
    A handler runs under its task's current lease, except in a worker that was declared lost. So no
    two live workers ever run one task, and none runs a finished one.
    """
    for attempt in world.attempts:
        if attempt.phase == RUNS and world.workers[attempt.place].process is Process.WORKS:
            row = world.rows[attempt.task]
            if row.state is not State.RUNNING or row.lease != attempt.lease:
                return False
    return True


def a_cancelled_task_does_not_wait(world: World) -> bool:
    """
    Once a cancellation was accepted, no other attempt of this generation begins.
    """
    return not any(row.cancel_requested and row.state in WAITING for row in world.rows)


# At every change of a row


class Change(NamedTuple):
    """
    What a step changed in a row.

    Attributes:
        lease: The lease under which the step wrote, 0 if it needed none.
    """

    before: Row
    after: Row
    lease: int
    paused: bool


def moves_are_arrows(change: Change) -> bool:
    """
    Every change of state is an arrow of the table.
    """
    before, after = change.before.state, change.after.state
    return before is after or (before, after) in ARROWS


def leases_fence(change: Change) -> bool:
    """
    Only a step that names the current lease moves a running task.
    """
    before, after = change.before, change.after
    if before.state is not State.RUNNING or after.state is State.RUNNING:
        return True
    return change.lease == before.lease


def an_old_lease_changes_nothing(change: Change) -> bool:
    """
    A write under a lease changes only the running task that was claimed under it.
    """
    if not change.lease:
        return True
    return change.before.state is State.RUNNING and change.before.lease == change.lease


def failures_are_kept(change: Change) -> bool:
    """
    Failures and generation change as the contract says, and attempts count claims.
    """
    before, after = change.before, change.after
    claimed = after.state is State.RUNNING and before.state is not State.RUNNING
    if after.attempt != before.attempt + claimed:
        return False
    if (before.state, after.state) in REDRIVES:
        return (after.generation, after.failures) == (before.generation + 1, 0)
    new_failures = after.failures - before.failures
    ended = before.state is State.RUNNING and after.state is not State.RUNNING
    return after.generation == before.generation and 0 <= new_failures <= ended


def nothing_starts_early_or_late(change: Change) -> bool:
    """
    A claim finds its task due, not expired, and its queue not paused.
    """
    before, after = change.before, change.after
    if before.state is State.RUNNING or after.state is not State.RUNNING:
        return True
    return before.due and not before.expired and not change.paused


IN_EVERY_WORLD: tuple[tuple[str, Callable[[World], bool]], ...] = (
    ("only a running task has a lease, and exactly one", only_running_has_a_lease),
    ("failures never exceed max_attempts", failures_are_bounded),
    ("no claim is in two hands", no_claim_twice),
    ("a handler runs under the current lease, or its worker was given up", what_runs_has_the_lease),
    ("a task that shall be cancelled never waits again", a_cancelled_task_does_not_wait),
)
AT_EVERY_CHANGE: tuple[tuple[str, Callable[[Change], bool]], ...] = (
    ("every change of state is in the table", moves_are_arrows),
    ("only the current lease moves a running task", leases_fence),
    ("an old lease changes nothing", an_old_lease_changes_nothing),
    ("failures count and never vanish in a generation", failures_are_kept),
    ("nothing starts early, late or while paused", nothing_starts_early_or_late),
)
