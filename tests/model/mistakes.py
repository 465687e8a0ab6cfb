"""
Mistakes that a task queue can make, some known from other systems, each written as the protocol
with one method changed. The exploration must find every one of them, or it proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from asyncflow.domain.states import Event, State
from tests.model.protocol import (
    ANSWER,
    NOTHING,
    Attempt,
    Protocol,
    Reaping,
    Step,
    World,
    progress,
    with_ready,
    with_row,
    with_sent,
)
from tests.model.statements import NO_LEASE, Row, moved


class SettlesUnderAnyLease(Protocol):
    """
    A settle checks only whether the task is running: a zombie ends another worker's attempt.
    """

    def holds(self, row: Row, lease: int) -> bool:
        return row.state is State.RUNNING


class SettlesInAnyState(Protocol):
    """
    A settle checks only the lease: repeated after a lost answer, it settles twice.
    """

    def holds(self, row: Row, lease: int) -> bool:
        return row.lease == lease


class ReapsById(Protocol):
    """
    The reaper guards by id alone and overwrites what was settled since it read
    (riverqueue/river#1302).
    """

    def reap(self, row: Row, seen: Reaping) -> Row:
        return self.settle(row._replace(state=State.RUNNING), lease=row.lease, event=seen.event)


class ReapsWhatRuns(Protocol):
    """
    The reaper checks the state again, but not the lease.
    """

    def reap(self, row: Row, seen: Reaping) -> Row:
        return self.settle(row, lease=row.lease, event=seen.event)


class NeverReaps(Protocol):
    """
    Recovery is left to RabbitMQ, which redelivers the hints of a dead worker.
    """

    def is_alive(self, world: World, owner: int) -> bool:
        return True


class ClaimsWhatRuns(Protocol):
    """
    A redelivered hint counts as proof that its worker died.
    """

    def may_be_claimed(self, row: Row, *, paused: bool) -> bool:
        runs = row.state is State.RUNNING
        return runs or super().may_be_claimed(row, paused=paused)


class ClaimsWhatIsNotDue(Protocol):
    """
    A hint is trusted: its sender is assumed to have checked.
    """

    def may_be_claimed(self, row: Row, *, paused: bool) -> bool:
        return super().may_be_claimed(row._replace(due=True), paused=paused)


class ClaimsWhilePaused(Protocol):
    """
    Pausing stops only the relay, not hints that it has already sent.
    """

    def may_be_claimed(self, row: Row, *, paused: bool) -> bool:
        return super().may_be_claimed(row, paused=False)


class ForgetsFailures(Protocol):
    """
    Each delivery starts counting from zero, so a poison task never ends.
    """

    def claim_hinted(self, row: Row, *, worker: int, paused: bool) -> Row:
        claimed = super().claim_hinted(row, worker=worker, paused=paused)
        return claimed if claimed is row else claimed._replace(failures=0)


class FailsOnlyAfterMaxAttempts(Protocol):
    """
    Off by one: a retry is granted when the failures are used up.
    """

    def settle(self, row: Row, *, lease: int, event: Event) -> Row:
        return super().settle(row, lease=lease, event=Event.RETRY if event is Event.FAIL else event)


class AnswersLiveLeasesWithARequeue(Protocol):
    """
    A hint that claims nothing is requeued and delivered again immediately, in an endless loop.
    """

    def after_no_claim(self, world: World, task: int) -> World:
        return with_ready(world, task, +1)


class NeverFindsLostHints(Protocol):
    """
    The relay trusts RabbitMQ to keep what it confirmed.
    """

    def knows_hints_are_lost(self, world: World) -> bool:
        return False


class OnlyTheRelayCrashes(NeverFindsLostHints):
    """
    Not a mistake while RabbitMQ loses nothing: publishing before marking is enough.
    """

    def faults(self, world: World) -> Iterator[Step]:
        yield from self.faults_of_the_relay(world)


class MarksBeforeItPublishes(OnlyTheRelayCrashes):
    """
    The relay marks first, crashes before it publishes, and no hint is ever sent.
    """

    def relay(self, world: World, task: int) -> Iterator[Step]:
        row = world.rows[task]
        if world.sent[task] != NOTHING:
            after = with_sent(with_ready(world, task, +1), task, NOTHING)
            yield progress("the relay publishes a hint of task {}", (task,), after)
        elif self.is_admissible(row) and not world.paused:
            marked = self.mark_queued(row, attempt=row.attempt)
            after = with_row(with_sent(world, task, row.attempt), task, marked)
            yield progress("the relay marks task {} as queued", (task,), after)


class BeatsWhileItHangs(Protocol):
    """
    The heartbeat's thread is alive, so a worker whose event loop hangs keeps its leases.
    """

    def notice_stall(self, world: World, place: int) -> Iterator[Step]:
        return iter(())


class KnowsNoOrphans(Protocol):
    """
    A claim whose answer was lost stays with a worker that sends heartbeats and never runs it.
    """

    def release_orphans(self, world: World, place: int) -> Iterator[Step]:
        return iter(())


class ReleasesWhatIsOnItsWay(Protocol):
    """
    A claim counts as an orphan while its answer may still arrive; its handler then runs without a
    lease, concurrently with the next attempt.
    """

    def is_known(self, attempt: Attempt, row: Row, place: int) -> bool:
        return super().is_known(attempt, row, place) and attempt.phase != ANSWER


class RetriesWhatIsCancelled(Protocol):
    """
    An accepted cancellation is forgotten when the attempt fails.
    """

    def settled_as(self, row: Row, event: Event) -> Event:
        return event


class CancelsWhatRuns(Protocol):
    """
    A cancellation overwrites a running attempt without its lease.
    """

    def cancel(self, row: Row) -> Row:
        return moved(row, Event.CANCEL) if row.state is State.RUNNING else super().cancel(row)


class RedrivesWhatCompleted(Protocol):
    """
    A redrive of any finished task runs a completed task again.
    """

    def redrive(self, row: Row) -> Row:
        if row.state is State.COMPLETED:
            return moved(row, Event.REDRIVE)._replace(failures=0, lease=NO_LEASE)
        return super().redrive(row)
