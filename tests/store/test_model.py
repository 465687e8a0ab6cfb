"""
PostgreSQL against the model: any sequence of statements produces the rows that the model predicts.

`model.protocol` explores what can happen if each statement does what `model.statements` says. This
closes the gap: the store's functions run in random order, with valid and invalid arguments, and
after each of them the database's rows are compared with the model's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as some
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from asyncflow.domain.outcome import Settlement
from asyncflow.domain.states import TERMINAL, Event, State
from asyncflow.domain.task import Claim
from asyncflow.errors import IllegalTransition, TaskNotFound
from asyncflow.store import claims, due, hints, queues, read, settle, steer, upkeep, workers
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.due import Admitted
from asyncflow.store.settle import Settling
from tests.model.statements import NO_LEASE, NOBODY, Row, Statements
from tests.support.builders import FAILURE, NAME, QUEUE, SETTLEMENTS, a_worker, backdate, submitted

T = TypeVar("T")

OTHER_NAME = "other"
NAMES = (NAME, OTHER_NAME)
OFFERS = ((NAME, OTHER_NAME), (NAME,))
"""The names that each of the two workers offers."""

LONG_SECONDS = 36_000.0
TASKS_MAX = 4

EVENT = some.sampled_from(sorted(SETTLEMENTS))
AGO = some.integers(0, 5)
"""Which task or lease, counted from the newest."""

CHORES = (
    "the_relay_looks",
    "the_reaper_looks",
    "tasks_expire",
    "the_broker_is_given_up",
    "finished_tasks_are_pruned",
)
"""One rule for all of them; otherwise most steps would find nothing left to do."""

ROWS = """
    SELECT id, state, generation, attempt, failures, lease_id, worker_id, max_attempts,
           cancel_requested_at IS NOT NULL AS cancel_requested,
           run_at <= now() AS due,
           coalesce(expires_at <= now(), false) AS expired
      FROM asyncflow.tasks
"""


class Lease(NamedTuple):
    """
    A lease that was granted at some point, still valid or not.
    """

    task_id: UUID
    lease_id: UUID
    number: int


class StoreAgainstModel(RuleBasedStateMachine):
    """
    The rules are the store's functions; the model says what each of them must have done.
    """

    def __init__(self, runner: asyncio.Runner, db: Database) -> None:
        super().__init__()
        self.runner = runner
        self.db = db
        self.model = Statements()
        self.rows: dict[UUID, Row] = {}
        self.task_ids: list[UUID] = []
        self.leases: list[Lease] = []
        self.names: dict[UUID, str] = {}
        self.lease_numbers: dict[UUID, dict[UUID, int]] = {}
        self.worker_numbers: dict[UUID, int] = {}
        self.alive: list[UUID] = []
        self.paused = False

    def wait(self, call: Coroutine[Any, Any, T]) -> T:
        """
        Run a call on the database and return its answer.
        """
        return self.runner.run(call)

    # Workers

    @initialize()
    def two_workers_start(self) -> None:
        for table in ("tasks", "attempts", "workers", "queues"):
            self.wait(self.db.execute(f"DELETE FROM asyncflow.{table}"))
        self.alive = [self.a_new_worker(place) for place in range(len(OFFERS))]
        for name in (NAME, OTHER_NAME, NAME):
            self.a_task_is_submitted(name=name, is_due=True)

    def a_new_worker(self, place: int) -> UUID:
        worker = self.wait(
            a_worker(self.db, handlers=OFFERS[place], lease_seconds=LONG_SECONDS, holds_lock=False)
        )
        self.worker_numbers[worker.id] = len(self.worker_numbers) + 1
        return worker.id

    @rule(place=some.sampled_from([0, 1]), says_goodbye=some.booleans())
    def a_worker_is_replaced(self, place: int, says_goodbye: bool) -> None:
        worker_id = self.alive[place]
        if says_goodbye:
            self.wait(workers.stop(self.db, worker_id))
        else:
            self.wait(backdate(self.db, "workers", worker_id, heartbeat_at=LONG_SECONDS + 1))
            lost = self.wait(workers.mark_lost(self.db, grace_seconds=0))
            assert [worker_id] == [lost_id for lost_id, _ in lost]
        assert not self.wait(workers.heartbeat(self.db, worker_id))
        self.alive[place] = self.a_new_worker(place)
        self.the_reaper_looks()

    # Submitting, asking, and the clock

    @rule(name=some.sampled_from(NAMES), is_due=some.booleans())
    def a_task_is_submitted(self, name: str, is_due: bool) -> None:
        if len(self.rows) == TASKS_MAX:
            return
        delay = 0.0 if is_due else LONG_SECONDS
        (task_id,) = self.wait(
            submitted(self.db, 1, name=name, delay_seconds=delay, max_attempts=2)
        )
        self.rows[task_id] = Row(due=is_due)
        self.names[task_id] = name
        self.lease_numbers[task_id] = {}
        self.task_ids.append(task_id)

    def task(self, ago: int) -> UUID:
        """
        The task submitted this many submissions ago; it may be pruned by now.
        """
        return self.task_ids[-1 - ago % len(self.task_ids)]

    def lease(self, ago: int) -> Lease:
        """
        The lease granted this many claims ago, or one that was never granted.
        """
        if not self.leases:
            return Lease(self.task(ago), uuid4(), NO_LEASE)
        return self.leases[-1 - ago % len(self.leases)]

    @rule(ago=AGO)
    def it_becomes_due(self, ago: int) -> None:
        task_id = self.task(ago)
        row = self.rows.get(task_id)
        if row is not None and row.state is State.PENDING:
            self.wait(backdate(self.db, "tasks", task_id, run_at=0))
            self.rows[task_id] = row._replace(due=True)

    @rule(ago=AGO)
    def its_deadline_passes(self, ago: int) -> None:
        task_id = self.task(ago)
        row = self.rows.get(task_id)
        if row is not None and row.state not in TERMINAL:
            self.wait(backdate(self.db, "tasks", task_id, expires_at=0))
            self.rows[task_id] = row._replace(expired=True)

    @rule(ago=AGO)
    def it_is_cancelled(self, ago: int) -> None:
        task_id = self.task(ago)
        row = self.rows.get(task_id)
        try:
            self.wait(steer.cancel(self.db, 1, task_id))
        except TaskNotFound:
            assert row is None
        except IllegalTransition:
            assert row is not None and row.state in TERMINAL
        else:
            assert row is not None and row.state not in TERMINAL
            self.rows[task_id] = self.model.cancel(row)

    @rule(ago=AGO)
    def it_is_run_now(self, ago: int) -> None:
        task_id = self.task(ago)
        row = self.rows.get(task_id)
        try:
            self.wait(steer.run_now(self.db, 1, task_id))
        except TaskNotFound:
            assert row is None
        except IllegalTransition:
            assert row is not None and row.state not in (State.PENDING, State.QUEUED)
        else:
            assert row is not None
            self.rows[task_id] = self.model.run_now(row)

    @rule(ago=AGO)
    def it_is_redriven(self, ago: int) -> None:
        task_id = self.task(ago)
        row = self.rows.get(task_id)
        redriven = row and self.model.redrive(row)
        try:
            self.wait(steer.redrive(self.db, 1, task_id))
        except TaskNotFound:
            assert row is None
        except IllegalTransition:
            assert redriven is row
        else:
            assert redriven is not None and redriven is not row
            self.rows[task_id] = redriven

    @rule(paused=some.sampled_from([False, False, True]))
    def the_queue_is_paused_or_resumed(self, paused: bool) -> None:
        self.wait((queues.pause if paused else queues.resume)(self.db, QUEUE))
        self.paused = paused

    # Claims

    @rule(place=some.sampled_from([0, 1]), agos=some.lists(AGO, min_size=1, max_size=3))
    def hints_are_claimed(self, place: int, agos: Sequence[int]) -> None:
        hints = [self.task(ago) for ago in agos]
        lease_id, worker_id = uuid4(), self.alive[place]
        taken = self.wait(
            claims.claim_hinted(
                self.db, hints, lease_id=lease_id, worker_id=worker_id, offers=_offers(place)
            )
        )
        expected = {
            task_id: self.model.claim_hinted(
                self.rows[task_id], worker=self.worker_numbers[worker_id], paused=self.paused
            )
            for task_id in set(hints) & set(self.rows)
            if self.names[task_id] in OFFERS[place]
        }
        self.claimed(taken, self.changed(expected))

    @rule(place=some.sampled_from([0, 1]), limit=some.sampled_from([1, 9]))
    def due_tasks_are_claimed(self, place: int, limit: int) -> None:
        lease_id, worker_id = uuid4(), self.alive[place]
        taken = self.wait(
            claims.claim_due(
                self.db,
                lease_id=lease_id,
                worker_id=worker_id,
                offers=_offers(place),
                queues=[QUEUE],
                limit=limit,
            )
        )
        possible = self.changed(
            {
                task_id: self.model.claim_due(
                    row, worker=self.worker_numbers[worker_id], paused=self.paused
                )
                for task_id, row in self.rows.items()
                if self.names[task_id] in OFFERS[place]
            }
        )
        assert min(limit, len(possible)) == len(taken)
        chosen = {claim.task_id for claim in taken}
        self.claimed(taken, {t: row for t, row in possible.items() if t in chosen})

    def changed(self, rows: dict[UUID, Row]) -> dict[UUID, Row]:
        """
        Record the rows that a statement changes.
        """
        return {task_id: row for task_id, row in rows.items() if row is not self.rows[task_id]}

    def claimed(self, taken: Sequence[Claim], expected: dict[UUID, Row]) -> None:
        """
        Check that a worker is told what the rows say.
        """
        assert {(task_id, row.attempt, row.failures) for task_id, row in expected.items()} == {
            (claim.task_id, claim.attempt, claim.failures) for claim in taken
        }
        self.rows |= expected
        for claim in taken:
            self.lease_numbers[claim.task_id][claim.lease_id] = claim.attempt
            self.leases.append(Lease(claim.task_id, claim.lease_id, claim.attempt))

    # Settles, under leases that hold and leases that were lost

    @rule(
        agos=some.lists(AGO, min_size=1, max_size=3),
        events=some.lists(EVENT, min_size=3, max_size=3),
    )
    def attempts_are_settled(self, agos: Sequence[int], events: Sequence[Event]) -> None:
        # No worker settles one lease twice in one call.
        leases = list(dict.fromkeys(self.lease(ago) for ago in agos))
        self.leases_are_settled(list(zip(leases, events, strict=False)))

    def leases_are_settled(self, settlings: Sequence[tuple[Lease, Event]]) -> None:
        """
        Leases settled in one call are each answered as the model predicts.
        """
        written = self.wait(
            settle.settle(
                self.db,
                [
                    Settling(lease.task_id, lease.lease_id, _settlement(event))
                    for lease, event in settlings
                ],
            )
        )
        assert [self.settled(lease, event) for lease, event in settlings] == written

    @rule(ago=AGO, place=some.sampled_from([0, 1]), event=EVENT)
    def a_worker_settles_late(self, ago: int, place: int, event: Event) -> None:
        """
        A worker settles again because it got no answer, and with any outcome after another claim.
        """
        self.hints_are_claimed(place, [ago])
        stale = self.lease(0)
        for _ in range(2):
            self.leases_are_settled([(stale, event)])
            self.the_rows_are_as_the_model_says()
        self.it_becomes_due(ago)
        self.hints_are_claimed(place, [ago])
        self.the_rows_are_as_the_model_says()
        for late in sorted(SETTLEMENTS):
            self.leases_are_settled([(stale, late)])

    @rule(ago=AGO, place=some.sampled_from([0, 1]), event=EVENT)
    def it_is_cancelled_while_it_runs(self, ago: int, place: int, event: Event) -> None:
        """
        A running task is cancelled, then its worker settles it with any outcome.
        """
        self.hints_are_claimed(place, [ago])
        self.it_is_cancelled(ago)
        self.the_rows_are_as_the_model_says()
        self.leases_are_settled([(self.lease(0), event)])

    @rule(ago=AGO, place=some.sampled_from([0, 1]))
    def its_deadline_passes_before_a_claim(self, ago: int, place: int) -> None:
        self.its_deadline_passes(ago)
        self.due_tasks_are_claimed(place, limit=9)

    def settled(self, lease: Lease, event: Event) -> bool:
        """
        Whether the model accepts this settlement.
        """
        row = self.rows.get(lease.task_id)
        if row is None:
            return False
        self.rows[lease.task_id] = self.model.settle(row, lease=lease.number, event=event)
        return self.rows[lease.task_id] is not row

    # The relay

    def the_relay_looks(self) -> None:
        admitted = self.wait(due.admissible(self.db, queue=QUEUE, names=NAMES, limit=9))
        expected = {t for t, row in self.rows.items() if self.model.is_admissible(row)}
        assert expected == {task.task_id for task in admitted}

    @rule(agos=some.lists(AGO, min_size=1, max_size=3), sent_before=some.integers(0, 1))
    def the_relay_marks(self, agos: Sequence[int], sent_before: int) -> None:
        # This many attempts ago.
        sent = {
            task_id: self.rows[task_id].attempt - sent_before
            for task_id in map(self.task, agos)
            if task_id in self.rows
        }
        self.wait(
            hints.mark_queued(self.db, [Admitted(*task, priority=4) for task in sent.items()])
        )
        for task_id, attempt in sent.items():
            self.rows[task_id] = self.model.mark_queued(self.rows[task_id], attempt=attempt)

    @rule(ready=some.integers(0, 2))
    def the_relay_finds_lost_hints(self, ready: int) -> None:
        queued = {t for t, row in self.rows.items() if row.state is State.QUEUED}
        count = self.wait(
            hints.unqueue_lost(self.db, queue=QUEUE, older_than_seconds=0, ready=ready, limit=9)
        )
        assert max(0, len(queued) - ready) == count
        # The order in which they were marked decides which ones.
        left = {row["id"] for row in self.wait(self.db.fetch(ROWS)) if row["state"] == "queued"}
        for task_id in queued - left:
            self.rows[task_id] = self.model.unqueue(self.rows[task_id])

    @rule(ago=AGO, place=some.sampled_from([0, 1]))
    def a_worker_declines(self, ago: int, place: int) -> None:
        task_id = self.task(ago)
        self.wait(
            hints.decline(self.db, [task_id], names=OFFERS[place], delay_seconds=LONG_SECONDS)
        )
        row = self.rows.get(task_id)
        if row is not None and self.names[task_id] not in OFFERS[place]:
            self.rows[task_id] = self.model.decline(row)

    def the_broker_is_given_up(self) -> None:
        self.wait(hints.unqueue_stranded(self.db, limit=9))
        self.rows = {task_id: self.model.unqueue(row) for task_id, row in self.rows.items()}

    # Maintenance

    @rule(chore=some.sampled_from(CHORES))
    def a_chore_is_done(self, chore: str) -> None:
        getattr(self, chore)()

    def the_reaper_looks(self) -> None:
        # What the reaper settles, and how late, is covered by what a stale worker may settle.
        alive = {self.worker_numbers[worker_id] for worker_id in self.alive}
        lost = self.wait(upkeep.lost_leases(self.db, limit=9))
        expected = {
            (task_id, row.lease, row.failures, row.cancel_requested)
            for task_id, row in self.rows.items()
            if row.state is State.RUNNING and row.owner not in alive
        }
        assert expected == {
            (
                one.task_id,
                self.lease_numbers[one.task_id][one.lease_id],
                one.failures,
                one.cancel_requested,
            )
            for one in lost
        }

    def tasks_expire(self) -> None:
        count = self.wait(upkeep.expire(self.db, limit=9))
        changed = self.changed({t: self.model.expire(row) for t, row in self.rows.items()})
        assert len(changed) == count
        self.rows |= changed

    def finished_tasks_are_pruned(self) -> None:
        count = self.wait(upkeep.prune_finished(self.db, older_than_days=0, limit=9))
        finished = {task_id for task_id, row in self.rows.items() if row.state in TERMINAL}
        assert len(finished) == count
        self.rows = {t: row for t, row in self.rows.items() if t not in finished}

    # The comparison

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        assert self.rows == self.found_rows()

    def found_rows(self) -> dict[UUID, Row]:
        """
        The database's rows in the model's terms.
        """
        found = {}
        for row in self.wait(self.db.fetch(ROWS)):
            state = State(row["state"])
            live = state not in TERMINAL
            lease_id = row["lease_id"]
            found[row["id"]] = Row(
                state=state,
                generation=row["generation"],
                attempt=row["attempt"],
                failures=row["failures"],
                lease=self.lease_numbers[row["id"]][lease_id] if lease_id else NO_LEASE,
                owner=self.worker_numbers.get(row["worker_id"], NOBODY) if live else NOBODY,
                cancel_requested=row["cancel_requested"] and live,
                due=row["due"] or not live,
                expired=row["expired"] and live,
                max_attempts=row["max_attempts"],
            )
        return found

    def teardown(self) -> None:
        """
        No attempt is missing from a task's history, and none is there twice.
        """
        for task_id, row in self.rows.items():
            history = self.wait(read.get(self.db, 1, task_id)).attempts
            assert [*range(1, row.attempt + 1)] == [attempt.attempt for attempt in history]


def _offers(place: int) -> list[Offer]:
    return [Offer(name, max_attempts=5, timeout_seconds=900.0) for name in OFFERS[place]]


def _settlement(event: Event) -> Settlement:
    if event is Event.RETRY:
        return Settlement(event, delay_seconds=LONG_SECONDS, failure=FAILURE)
    return SETTLEMENTS[event]


def compare(url: str, *, examples: int) -> None:
    """
    Run this many sequences of statements, the same ones every time.
    """
    with asyncio.Runner() as runner:
        db = Database(url, size=1)
        runner.run(db.__aenter__())
        try:
            run_state_machine_as_test(
                lambda: StoreAgainstModel(runner, db),  # type: ignore[arg-type]
                settings=settings(
                    max_examples=examples,
                    stateful_step_count=50,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            runner.run(db.close())


def test_the_store_does_what_the_model_says(shared_database_url: str) -> None:
    """
    The store agrees with the model in any order of statements, under lost leases, and for pruned
    tasks.
    """
    compare(shared_database_url, examples=80)


@pytest.mark.any_postgres
@pytest.mark.parametrize(
    ("statement", "guard"),
    [
        ("SETTLE_COMPLETED", "AND t.lease_id = {lease}"),
        ("SETTLE_FAILED", "AND t.state = 'running'"),
        ("SETTLE_RELEASED", "AND t.cancel_requested_at IS NULL"),
        ("CLAIM_HINTED", "AND t.run_at <= now()"),
        ("CLAIM_DUE", "AND (t.expires_at IS NULL OR t.expires_at > now())"),
    ],
)
def test_a_guard_that_is_missing_is_found(
    shared_database_url: str, monkeypatch: pytest.MonkeyPatch, statement: str, guard: str
) -> None:
    """
    The comparison detects each missing guard; it would be worthless if it never failed.
    """
    module = settle if statement in vars(settle) else claims
    original = getattr(module, statement)
    # Every parameter must keep its type.
    instead = "AND $2::uuid[] IS NOT NULL" if "lease" in guard else ""
    broken = original.replace(guard.format(lease=claims.LEASE), instead)
    assert original != broken
    monkeypatch.setattr(module, statement, broken)
    settles = {e: broken if sql == original else sql for e, sql in settle._SETTLES.items()}
    monkeypatch.setattr(settle, "_SETTLES", settles)

    with pytest.raises(AssertionError):
        compare(shared_database_url, examples=1_000)  # Far fewer: it stops at the first.
