"""
A worker on the real store: every end of an attempt is recorded correctly, and neither a shutdown
nor an outage loses a task or lets an attempt without a lease write anything.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from asyncflow import Context, Reject, Retry
from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import State
from asyncflow.domain.task import Claim
from asyncflow.errors import WorkerExhausted, WorkerLost
from asyncflow.handlers import DEFAULT_REGISTRY, Registry
from asyncflow.maintenance.reaper import Reaper
from asyncflow.store import claims, steer, workers
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.wakeups import Listener
from asyncflow.transport.postgres import PostgresTransport
from asyncflow.worker.lease import STALLED_EXIT_STATUS
from asyncflow.worker.times import Times
from tests.support.postgres import PostgresServer
from tests.support.roles import GRANTS, administrator
from tests.support.running import a_running_worker, read
from tests.support.tasks import (
    PATIENCE_SECONDS,
    QUEUE,
    cut_every_connection,
    state,
    states,
    submit,
    until,
    until_states,
)
from tests.support.wire import Wire, laid
from tests.worker import odd_handlers

assert odd_handlers  # it declares handlers that some of these tests run
NO_WAIT = Backoff(base_seconds=0.0)


class Gate:
    """
    A handler that signals when it is entered, and returns when the test allows it.
    """

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.interrupted = asyncio.Event()
        self.returned = asyncio.Event()
        self.open = asyncio.Event()

    @property
    def handler(self) -> Callable[..., Any]:
        """
        The gate as a function for a registry.
        """

        async def gate() -> str:
            self.entered.set()
            try:
                await self.open.wait()
            except asyncio.CancelledError:
                self.interrupted.set()
                raise
            self.returned.set()
            return "through"

        return gate


async def soon(event: asyncio.Event) -> None:
    """
    Wait for an event that is about to happen.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        await event.wait()


async def test_what_a_handler_returns_is_the_result(db: Database) -> None:
    """
    The payload becomes the handler's arguments, and its return value the result.
    """

    async def double(n: int) -> int:
        return 2 * n

    [task_id] = await submit(db, payload='{"n": 21}')
    async with a_running_worker(db, double) as running:
        await until_states(db, completed=1)

        task = await read(db, task_id)

    assert ("42", 1, 0) == (task.result, task.attempt, task.failures)
    assert running.registration.id == task.worker_id


async def test_a_worker_that_has_started_wakes_what_waited_for_one(db: Database) -> None:
    """
    A started worker wakes the relay, which sends it tasks immediately rather than at its next poll.
    """

    async def idle() -> None: ...

    heard: asyncio.Queue[None] = asyncio.Queue()
    async with Listener(db, lambda: heard.put_nowait(None)):
        await asyncio.wait_for(heard.get(), PATIENCE_SECONDS)  # The listener is ready now.
        async with a_running_worker(db, idle):
            await asyncio.wait_for(heard.get(), PATIENCE_SECONDS)


async def test_a_failing_handler_is_retried_until_its_attempts_are_used_up(db: Database) -> None:
    """
    A failing task is retried until its attempts are used up, and ends as a dead letter that says
    why.
    """

    async def fail() -> None:
        raise ValueError("no luck")

    [task_id] = await submit(db)
    async with a_running_worker(db, fail, max_attempts=3, backoff=NO_WAIT):
        await until_states(db, failed=1)

    task = await read(db, task_id)
    assert ["retried", "retried", "failed"] == [a.outcome for a in task.attempts]
    assert task.failure is not None
    assert ("ValueError", "no luck") == (task.failure["kind"], task.failure["message"])
    assert 3 == task.failures


async def test_a_retry_waits_as_long_as_its_handler_asks(db: Database) -> None:
    """
    `Retry(after_seconds=…)` sets when the next attempt is due.
    """

    async def later() -> None:
        raise Retry(after_seconds=500)

    [task_id] = await submit(db)
    async with a_running_worker(db, later):

        async def is_retrying() -> bool:
            return (await read(db, task_id)).status == "RETRYING"

        await until(is_retrying)

    task = await read(db, task_id)
    assert 480 < (task.run_at - task.created_at).total_seconds() < 520


async def test_a_rejected_task_is_not_tried_again(db: Database) -> None:
    """
    `Reject` ends a task at its first attempt.
    """

    async def reject() -> None:
        raise Reject("unreadable scan")

    [task_id] = await submit(db)
    async with a_running_worker(db, reject):
        await until_states(db, failed=1)

    task = await read(db, task_id)
    assert 1 == task.attempt
    assert task.failure is not None
    assert "Reject" == task.failure["kind"]


async def test_an_attempt_ends_when_its_time_is_up(db: Database) -> None:
    """
    A timeout is a failure like any other.
    """
    gate = Gate()
    [task_id] = await submit(db, timeout_seconds=0.05, max_attempts=1)
    async with a_running_worker(db, gate.handler):
        await until_states(db, failed=1)

    task = await read(db, task_id)
    assert gate.interrupted.is_set()
    assert task.failure is not None
    assert "TimedOut" == task.failure["kind"]


async def test_a_running_task_is_cancelled_on_request(db: Database) -> None:
    """
    The next heartbeat delivers the cancellation, and the handler is stopped.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler):
        await soon(gate.entered)

        await steer.cancel(db, 1, task_id)

        await until_states(db, cancelled=1)
    assert gate.interrupted.is_set()


async def test_no_more_attempts_run_concurrently_than_there_are_slots(db: Database) -> None:
    """
    No more attempts run concurrently than there are slots, even if many short tasks are claimed
    ahead.
    """
    running = most = 0

    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    await submit(db, 500)
    async with a_running_worker(db, count, slots=3):
        await until_states(db, completed=500)

    assert 3 == most


async def test_progress_can_be_read_while_the_handler_runs(db: Database) -> None:
    """
    The latest progress report can be read while the handler runs.
    """
    gate = Gate()

    async def report(context: Context) -> None:
        context.progress(0.25, "begun")
        context.progress(0.5, "half of it")
        await gate.open.wait()

    [task_id] = await submit(db)
    async with a_running_worker(db, report):

        async def shows() -> bool:
            return (await read(db, task_id)).progress is not None

        await until(shows)
        task = await read(db, task_id)
        gate.open.set()
        await until_states(db, completed=1)

    assert {"fraction": 0.5, "message": "half of it"} == task.progress


async def test_a_result_the_database_refuses_fails_its_task_and_no_other(db: Database) -> None:
    """
    A task whose result cannot be stored fails; tasks settled in the same batch are unaffected.
    """
    await db.execute(
        "ALTER TABLE asyncflow.tasks_finished ADD CHECK (result::text <> '\"cursed\"')"
    )

    async def say(word: str) -> str:
        return word

    [cursed] = await submit(db, payload='{"word": "cursed"}')
    await submit(db, 20, payload='{"word": "fine"}')
    async with a_running_worker(db, say, slots=30):
        await until_states(db, completed=20, failed=1)

    task = await read(db, cursed)
    assert task.failure is not None
    assert "Unstorable" == task.failure["kind"]


async def test_a_stopping_worker_lets_its_attempts_finish(db: Database) -> None:
    """
    Attempts complete within the grace period of a stopping worker; no new task is taken.
    """
    gate = Gate()
    [mine] = await submit(db)
    async with a_running_worker(db, gate.handler, grace_seconds=60) as running:
        await soon(gate.entered)
        running.worker.stop()
        [later] = await submit(db)
        await until_said_to_stop(running.transport)

        gate.open.set()
        await running.end()

    assert ["completed", "pending"] == [await state(db, mine), await state(db, later)]
    assert await db.fetchval("SELECT stopped_at IS NOT NULL FROM asyncflow.workers")


async def until_said_to_stop(transport: Any) -> None:
    """
    Wait until the transport has stopped: a take then returns immediately, with nothing.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        assert [] == await transport.take(1, window=1)


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[Wire]:
    """
    The worker's own connection to PostgreSQL, where it does not share the test's.
    """
    async with laid({"postgres": database_url}) as wires:
        yield wires["postgres"]


async def test_a_claim_that_hangs_holds_up_no_grace_period(db: Database, wire: Wire) -> None:
    """
    The grace period begins when the worker is asked to stop, even while a claim hangs; tasks that
    the claim returns later are released unpunished.
    """
    gate, other = Gate(), Gate()
    [mine] = await submit(db)
    await submit(db, name="gate")
    async with (
        Database(wire.url, timeout_seconds=PATIENCE_SECONDS) as far,
        a_running_worker(
            *(far, gate.handler, other.handler),
            slots=2,
            grace_seconds=0.1,
            heartbeat_seconds=60,
            lease_seconds=600,
        ) as running,
    ):
        await soon(gate.entered)
        await soon(other.entered)
        # The claim returns nothing at first, then whatever it finds.
        [late] = await submit(db)
        wire.hold_answers("FOR UPDATE SKIP LOCKED")
        other.open.set()
        await wire.has_answered()
        gate.entered.clear()

        running.worker.stop()
        await soon(gate.interrupted)

        assert "running" == await state(db, late)
        wire.release_answers()
        await running.end()

    for task in [await read(db, mine), await read(db, late)]:
        assert ("PENDING", 0) == (task.status, task.failures)
        assert ["released"] == [attempt.outcome for attempt in task.attempts]
    assert not gate.entered.is_set()


async def test_a_heartbeat_that_hangs_keeps_no_worker_from_ending(db: Database, wire: Wire) -> None:
    """
    A hanging heartbeat does not delay a worker's exit, however long its leases, and so a
    heartbeat's timeout, are.
    """
    async with (
        Database(wire.url) as far,
        a_running_worker(far, idle, lease_seconds=3_600, times=Times(goodbye=0.1)) as running,
    ):
        await until(lambda: holders(db))
        wire.hold_answers("UPDATE asyncflow.workers")
        await wire.has_answered()

        running.worker.stop()
        await running.end()


async def test_attempts_that_outlast_the_grace_period_are_released(db: Database) -> None:
    """
    Attempts that outlast the grace period are interrupted, unpunished, and due immediately for
    another worker.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler, grace_seconds=0.1) as running:
        await soon(gate.entered)
        running.worker.stop()
        await running.end()

    task = await read(db, task_id)
    assert gate.interrupted.is_set()
    assert ("PENDING", 0) == (task.status, task.failures)
    assert ["released"] == [attempt.outcome for attempt in task.attempts]


async def test_a_second_request_to_stop_releases_immediately(db: Database) -> None:
    """
    On a second request to stop, the worker releases its attempts without waiting for the grace
    period.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler, grace_seconds=3_600) as running:
        await soon(gate.entered)
        running.worker.stop()
        running.worker.stop()
        await running.end()

    assert State.PENDING == (await read(db, task_id)).state


async def test_claims_without_a_slot_go_back_and_are_not_claimed_again(db: Database) -> None:
    """
    When a long task takes the slot, short tasks claimed ahead are released for others and not
    claimed again.
    """
    times = Times(claim_wait_max=0.2, tick=0.05)
    gate = Gate()

    async def quick() -> None:
        pass

    await submit(db, 100, name="quick")
    async with a_running_worker(db, gate.handler, quick, slots=1, times=times):
        await until_states(db, completed=100)
        [slow] = await submit(db, priority=9)
        await soon(gate.entered)
        waiting = await submit(db, 10, name="quick")

        async def all_released() -> bool:
            return await states(db) == {"completed": 100, "running": 1, "pending": 10}

        await until(all_released)
        # Long enough to claim them ahead many times over.
        await asyncio.sleep(1.0)

        attempts = [(await read(db, task_id)).attempt for task_id in waiting]
        # Twice, if a take that still expected short tasks was in flight.
        assert 2 >= max(attempts)
        gate.open.set()
        await until_states(db, completed=111)
    assert "completed" == await state(db, slow)


async def test_a_settle_outlives_an_outage_of_the_database(
    db: Database, postgres_server: PostgresServer
) -> None:
    """
    The result of a handler that ends while PostgreSQL is down is settled after the outage.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler, lease_seconds=60):
        await soon(gate.entered)
        postgres_server.cluster.kill()
        gate.open.set()
        await soon(gate.returned)

        postgres_server.cluster.start()

        await until_completed(db, task_id)
    task = await read(db, task_id)
    assert ('"through"', 1) == (task.result, task.attempt)


async def until_completed(db: Database, task_id: Any) -> None:
    """
    Wait for a completed task on a server that may still be starting.
    """

    async def is_completed() -> bool:
        return await state(db, task_id) == "completed"

    await until(is_completed)


async def test_a_worker_that_cannot_beat_stops_its_attempts_and_writes_nothing(
    db: Database, postgres_server: PostgresServer
) -> None:
    """
    A worker that cannot send heartbeats fences itself before its leases expire, and continues once
    PostgreSQL is back.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler, lease_seconds=1.0):
        await soon(gate.entered)
        postgres_server.cluster.kill()
        await soon(gate.interrupted)
        gate.open.set()

        postgres_server.cluster.start()

        await until_completed(db, task_id)
    task = await read(db, task_id)
    assert ["released", "completed"] == [attempt.outcome for attempt in task.attempts]
    assert 0 == task.failures


async def test_cut_sessions_do_not_disturb_a_worker(db: Database, database_url: str) -> None:
    """
    After PostgreSQL ends every session, the running attempt completes.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler):
        await soon(gate.entered)

        await cut_every_connection(database_url)
        gate.open.set()

        await until_completed(db, task_id)
    assert 1 == (await read(db, task_id)).attempt


async def test_a_worker_declared_dead_ends_and_writes_nothing(db: Database) -> None:
    """
    A worker declared dead exits and writes nothing: its tasks belong to others, and it must return
    under a new id.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler) as running:
        await soon(gate.entered)
        await db.execute("UPDATE asyncflow.workers SET lost_at = now()")

        with pytest.raises(WorkerLost):
            await running.end()

    assert gate.interrupted.is_set()
    task = await read(db, task_id)
    assert (State.RUNNING, ()) == (task.state, task.attempts[:-1])


async def test_a_handler_that_freezes_its_process_past_the_fence_is_charged(db: Database) -> None:
    """
    A handler that holds the GIL past the fence, so that no heartbeats are sent, is charged. If it
    were released unpunished, it would do the same again and again.
    """

    async def freeze() -> None:
        ctypes.PyDLL(None).usleep(1_500_000)
        await asyncio.sleep(600)

    [task_id] = await submit(db)
    async with a_running_worker(db, freeze, lease_seconds=1.0) as running:
        with pytest.raises(WorkerLost):
            await running.end()

    reaper = Reaper(grace_seconds=0)

    async def is_charged() -> bool:
        await reaper.reap(db)
        return (await read(db, task_id)).failures == 1

    await until(is_charged)


async def idle() -> None:
    """
    A handler that no task uses.
    """


async def holders(db: Database) -> set[int]:
    """
    The server pids of the sessions that hold a worker's lock.
    """
    rows = await db.fetch("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted")
    return {row["pid"] for row in rows}


async def heartbeat_follows(db: Database) -> None:
    """
    Wait for another heartbeat of a worker.
    """
    before = await db.fetchval("SELECT now()")

    async def beats_again() -> bool:
        beat = await db.fetchval("SELECT heartbeat_at FROM asyncflow.workers")
        return bool(beat > before)

    await until(beats_again)


async def test_a_worker_takes_its_lock_back_as_soon_as_it_can(db: Database) -> None:
    """
    After a cut connection the worker retakes its lock once PostgreSQL has noticed that the old
    session is gone.
    """
    async with a_running_worker(db, idle) as running:
        await until(lambda: holders(db))
        [pid] = await holders(db)
        ghost = await db.connect("ghost")
        await db.fetchval("SELECT pg_terminate_backend($1)", pid)

        async def ghost_holds_it() -> bool:
            return await workers.hold_lock(ghost, running.registration.id)

        await until(ghost_holds_it)
        await heartbeat_follows(db)
        await ghost.close()
        await until(lambda: holders(db))


async def test_a_worker_that_stops_without_a_connection_says_goodbye_on_a_new_one(
    db: Database, database_url: str
) -> None:
    """
    A worker without a connection signs off on a new one; otherwise it would be declared dead
    although it stopped properly.
    """
    async with a_running_worker(db, idle, times=Times(heartbeat_retry=3_600)) as running:
        await until(lambda: holders(db))
        await cut_every_connection(database_url)

        running.worker.stop()
        await running.end()

    assert await db.fetchval("SELECT stopped_at IS NOT NULL FROM asyncflow.workers")


async def test_a_table_that_is_locked_for_long_costs_no_worker_its_session(db: Database) -> None:
    """
    While another application's migration locks a table that heartbeats read, the worker keeps its
    session. If it dropped the session, its lock could be released, and PostgreSQL, which does not
    notice, would keep one more session each time.
    """

    async def sessions() -> list[int]:
        rows = await db.fetch(
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE '% leases'"
        )
        return [row["pid"] for row in rows]

    # A sixth of the lease is how long a statement of the heartbeat may take.
    async with a_running_worker(db, idle, lease_seconds=3.0):
        await until(lambda: holders(db))
        before = await sessions()
        migration = await db.connect("migration")
        async with migration.transaction():
            await migration.execute("LOCK TABLE asyncflow.tasks IN ACCESS EXCLUSIVE MODE")

            for _ in range(3):
                await heartbeat_follows(db)

            assert before == await sessions()
        await migration.close()


async def refused_beats(logs: Sequence[Mapping[str, Any]], count: int) -> None:
    """
    Wait until this many more heartbeats have been refused.
    """
    before = len(logs)

    async def are_refused() -> bool:
        failed = [line for line in logs[before:] if line["event"] == "heartbeat.failed"]
        return len(failed) >= count

    await until(are_refused)


async def test_a_missing_right_costs_a_worker_neither_its_lock_nor_its_attempts(
    db: Database, postgres_server: PostgresServer, database_url: str
) -> None:
    """
    A missing privilege costs a worker neither its session nor its attempts. Without the session its
    lock would be free and its heartbeat overdue, and a reaper that has the privilege would declare
    it dead.
    """
    gate = Gate()
    [task_id] = await submit(db)
    with capture_logs() as logs:
        async with (
            administrator(postgres_server, database_url) as admin,
            Database(admin.url) as own,
            a_running_worker(own, gate.handler),
        ):
            await soon(gate.entered)
            await until(lambda: holders(db))
            before = await holders(db)
            await admin.execute("REVOKE ALL ON asyncflow.workers, asyncflow.tasks FROM {role}")
            # A heartbeat is overdue after this.
            await refused_beats(logs, 10)
            gate.open.set()
            await soon(gate.returned)
            await Reaper(grace_seconds=0).reap(db)
            during = await holders(db)
            await admin.execute(GRANTS)
            await until_completed(db, task_id)

    assert before == during
    task = await read(db, task_id)
    assert (1, 0) == (task.attempt, task.failures)
    assert {"worker.lost", "worker.fenced"}.isdisjoint(line["event"] for line in logs)


async def test_a_worker_whose_row_is_gone_for_a_moment_goes_on(db: Database) -> None:
    """
    A worker whose row is missing for a moment continues, as during a restore, when tables appear
    one after another.
    """
    gate = Gate()
    [task_id] = await submit(db)
    with capture_logs() as logs:
        async with a_running_worker(db, gate.handler):
            await soon(gate.entered)
            await db.execute("CREATE TABLE asyncflow.kept AS SELECT * FROM asyncflow.workers")
            await db.execute("DELETE FROM asyncflow.workers")
            await refused_beats(logs, 3)
            await db.execute("INSERT INTO asyncflow.workers SELECT * FROM asyncflow.kept")
            await heartbeat_follows(db)
            gate.open.set()
            await until_completed(db, task_id)

    assert 1 == (await read(db, task_id)).attempt


async def test_a_worker_whose_row_is_gone_for_good_comes_back_as_another(db: Database) -> None:
    """
    A worker whose row is gone for good, as after a restore from an older backup, returns under a
    new id.
    """
    async with a_running_worker(db, idle, lease_seconds=1.0) as running:
        await until(lambda: holders(db))
        await db.execute("DELETE FROM asyncflow.workers")

        with pytest.raises(WorkerLost):
            await running.end()


async def test_a_late_settle_of_a_lost_lease_is_void(db: Database) -> None:
    """
    If the lease is lost while the handler runs, its result changes nothing.
    """
    gate = Gate()
    [task_id] = await submit(db)
    async with a_running_worker(db, gate.handler, heartbeat_seconds=60):
        await soon(gate.entered)
        await db.execute("UPDATE asyncflow.tasks SET lease_id = $1", uuid4())

        gate.open.set()
        await soon(gate.returned)
        [other] = await submit(db)
        await until_completed(db, other)

        assert "running" == await state(db, task_id)


async def test_a_claim_whose_answer_was_lost_is_released(db: Database) -> None:
    """
    A task that the database says the worker holds, and that the worker does not know, is released.
    """

    async def work() -> None:
        pass

    async with a_running_worker(db, work) as running:
        await submit(db)
        await until_states(db, completed=1)
        offers = [Offer("orphan", 5, 900.0)]
        [task_id] = await submit(db, name="orphan")
        await claims.claim_due(
            db,
            lease_id=uuid4(),
            worker_id=running.registration.id,
            offers=offers,
            queues=[QUEUE],
            limit=1,
        )

        await until_states(db, completed=1, pending=1)

    task = await read(db, task_id)
    assert (["released"], 0) == ([a.outcome for a in task.attempts], task.failures)


async def test_a_claim_that_comes_after_its_release_is_not_run(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A claim whose answer arrives after the worker released it as an orphan is not run.
    """
    may_come = asyncio.Event()
    take = PostgresTransport.take

    async def slow_take(transport: PostgresTransport, slots: int, *, window: int) -> list[Claim]:
        taken = await take(transport, slots, window=window)
        await may_come.wait()
        return taken

    async def is_released() -> bool:
        return [a.outcome for a in (await read(db, task_id)).attempts] == ["released"]

    attempts = []

    async def work(context: Context) -> None:
        attempts.append(context.attempt)

    monkeypatch.setattr(PostgresTransport, "take", slow_take)
    [task_id] = await submit(db)
    async with a_running_worker(db, work):
        await until(is_released)
        may_come.set()
        await until_states(db, completed=1)

    assert [2] == attempts


async def test_a_thread_that_cannot_be_stopped_keeps_its_slot(db: Database) -> None:
    """
    A thread that cannot be stopped keeps its slot, so stuck handlers do not pile up.
    """
    entered = 0
    may_end = threading.Event()

    def stubborn() -> None:
        nonlocal entered
        entered += 1
        may_end.wait(PATIENCE_SECONDS)

    await submit(db, timeout_seconds=0.05, max_attempts=1)
    await submit(db, timeout_seconds=600, max_attempts=1)
    async with a_running_worker(db, stubborn, slots=1, cancel_grace_seconds=0.05):
        await until_states(db, failed=1, pending=1)
        assert 1 == entered
        may_end.set()
        await until_states(db, failed=1, completed=1)


async def test_a_worker_whose_every_slot_is_stuck_ends(db: Database) -> None:
    """
    A worker with every slot stuck exits: it would run nothing, while a new process starts with free
    slots.
    """
    may_end = threading.Event()

    def stubborn() -> None:
        may_end.wait(PATIENCE_SECONDS)

    await submit(db, timeout_seconds=0.05, max_attempts=1)
    async with a_running_worker(
        db, stubborn, slots=1, cancel_grace_seconds=0.05, times=Times(stall=0.2)
    ) as running:
        with pytest.raises(WorkerExhausted):
            await running.end()
        may_end.set()
    assert {"failed": 1} == await states(db)


STALLING = """
import asyncio, sys, threading, time
from asyncflow.telemetry.logs import configure_logs
from tests.support.tasks import database, submit
from tests.support.running import a_running_worker
from asyncflow.worker.times import Times

started = set()

async def stall():
    while len(started) < 2:
        await asyncio.sleep(0.01)
    {block}

async def loop_neighbour():
    started.add("loop")
    await asyncio.sleep(600)

def thread_neighbour():
    started.add("thread")
    time.sleep(600)

async def main(url):
    configure_logs(level="info", log_format="json", process="worker")
    async with database(url) as db:
        for name in ("work", "loop_neighbour", "thread_neighbour"):
            await submit(db, name=name)
        functions = (stall, loop_neighbour, thread_neighbour)
        async with a_running_worker(db, *functions, times=Times(stall=0.5)) as running:
            await running.end()

asyncio.run(main(sys.argv[1]))
"""


async def stalled(block: str, database_url: str) -> subprocess.CompletedProcess[bytes]:
    """
    Run a worker whose loop is blocked in this way, by one of three attempts, until it exits.
    """
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", STALLING.replace("{block}", block), database_url],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )
    assert STALLED_EXIT_STATUS == ended.returncode, ended.stderr
    return ended


async def test_a_handler_that_blocks_the_loop_ends_its_worker_and_is_charged(
    db: Database, database_url: str
) -> None:
    """
    A handler that blocks the loop ends its worker and is charged, with a failure that says where it
    blocked. Its neighbours are released and not charged.
    """
    ended = await stalled("time.sleep(600)", database_url)

    rows = await db.fetch("SELECT id, name, state, failures FROM asyncflow.tasks")
    assert {
        "work": ("pending", 1),
        "loop_neighbour": ("pending", 0),
        "thread_neighbour": ("pending", 0),
    } == {row["name"]: (row["state"], row["failures"]) for row in rows}
    [blocker] = [row["id"] for row in rows if row["name"] == "work"]
    [attempt] = (await read(db, blocker)).attempts
    assert attempt.failure is not None
    assert ("retried", "LoopBlocked") == (attempt.outcome, attempt.failure["kind"])
    assert "in stall" in attempt.failure["traceback"].splitlines()[1]
    assert await db.fetchval("SELECT bool_and(stopped_at IS NOT NULL) FROM asyncflow.workers")
    [line] = [json.loads(line) for line in ended.stderr.splitlines() if b"worker.stalled" in line]
    assert (str(blocker), "work", 3) == (line["task_id"], line["name"], line["running"])
    assert "in stall" in line["stack"]


async def test_if_what_blocks_the_loop_is_unknown_all_that_might_are_charged(
    db: Database, database_url: str
) -> None:
    """
    If it is unknown which handler blocks the loop, all candidates are charged; otherwise the
    culprit would stop one worker after another.
    """
    block = "asyncio.get_running_loop().call_soon(time.sleep, 600); await asyncio.sleep(600)"

    ended = await stalled(block, database_url)

    rows = await db.fetch("SELECT name, failures FROM asyncflow.tasks")
    charged = {row["name"]: row["failures"] for row in rows}
    assert {"work": 1, "loop_neighbour": 1, "thread_neighbour": 0} == charged
    [line] = [json.loads(line) for line in ended.stderr.splitlines() if b"worker.stalled" in line]
    assert {"work", "loop_neighbour"} == set(line["name"].split(","))


async def test_an_idle_worker_stops_immediately(db: Database) -> None:
    """
    An idle worker stops immediately.
    """
    async with a_running_worker(db, Gate().handler, grace_seconds=3_600) as running:
        await until_registered(db)
        running.worker.stop()
        await running.end()

    assert await db.fetchval("SELECT stopped_at IS NOT NULL FROM asyncflow.workers")


async def until_registered(db: Database) -> None:
    """
    Wait until a worker has registered.
    """

    async def is_registered() -> bool:
        return bool(await db.fetchval("SELECT count(*) FROM asyncflow.workers"))

    await until(is_registered)


async def test_a_worker_can_be_stopped_while_the_database_is_away(
    db: Database, postgres_server: PostgresServer
) -> None:
    """
    A worker stopped while the database is down exits without signing off.
    """
    async with a_running_worker(db, Gate().handler) as running:
        await until_registered(db)
        postgres_server.cluster.stop()
        running.worker.stop()
        await running.end()
    postgres_server.cluster.start()


async def test_what_its_machine_lacks_costs_a_task_nothing(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A task that its machine cannot start is released and runs once it can; its only attempt is not
    used up.
    """
    handler = DEFAULT_REGISTRY.get("number.process")
    assert handler is not None
    registry = Registry()
    registry.add(handler)

    async def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with a_running_worker(db, registry=registry):
        with monkeypatch.context() as full:
            full.setattr(asyncio, "create_subprocess_exec", refuse)
            [task_id] = await submit(db, name=handler.name, max_attempts=1)
            await until_released(db, task_id)
        await until_states(db, completed=1)
        task = await read(db, task_id)

    assert 0 == task.failures
    assert "released" == task.attempts[0].outcome


async def until_released(db: Database, task_id: UUID) -> None:
    async def is_released() -> bool:
        return bool((await read(db, task_id)).attempts)

    await until(is_released)
