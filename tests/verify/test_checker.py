"""
The checker against hand-written histories: it passes the true ones and finds the lie in the others.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from asyncflow.domain.states import TERMINAL, TRANSITIONS
from asyncflow.verify import checker
from tests.verify.stories import (
    FIRST_LEASE,
    OTHER_WORKER,
    SECOND_LEASE,
    TASK,
    WORKER,
    Change,
    Story,
    a_good_run,
    a_row,
    micros,
)


def refused_and_stored(story: Story) -> None:
    story.drop("submit.ok")
    story.seen(1.1, "submit.fail", n=1, status=422)


def stored_twice(story: Story) -> None:
    story.recorded(6.0, "db.row", **a_row(task="another"))


def a_batch_in_part(story: Story) -> None:
    story.drop("submit.ok")
    story.find("submit.invoke")["batch"] = 1
    story.seen(1.0, "submit.invoke", n=2, recipe="noop", digest="d2", times=0, batch=1)
    for number in (1, 2):
        story.seen(1.1, "submit.info", n=number, status=503, batch=1)


def alive_at_the_end(story: Story) -> None:
    story.drop("db.move", new="completed")
    story.find("db.row").update(state="running", has_result=False)


def cancelled_after_completion(story: Story) -> None:
    story.moved(2.5, "completed", "cancelled")
    story.find("db.row").update(state="cancelled", has_result=False)


def a_gap(story: Story) -> None:
    story.find("db.move", old="running", new="completed")["old"] = "queued"


def a_redrive_nobody_asked_for(story: Story) -> None:
    story.moved(2.5, "completed", "pending", generation=2, failures=0)
    story.find("db.row").update(state="pending", has_result=False)


def a_lease_given_twice(story: Story) -> None:
    story.find("db.move", old="pending", attempt=2)["lease"] = FIRST_LEASE


def taken_from_a_live_worker(story: Story) -> None:
    story.find("db.move", old="running", new="pending")["kind"] = "WorkerLost"


def given_up_in_haste(story: Story) -> None:
    story.heartbeats(OTHER_WORKER, 1.0)
    story.gone(1.3, OTHER_WORKER, silent=0.3)


def revived(story: Story) -> None:
    story.heartbeats(WORKER, 5.5)


def run_without_a_claim(story: Story) -> None:
    story.ran("cccccccc", 1.6, 1.7, attempt=2, how="stopped")


def run_twice_under_one_lease(story: Story) -> None:
    story.ran(SECOND_LEASE, 1.95, 2.0, attempt=2, how="stopped")


def run_before_its_claim(story: Story) -> None:
    story.find("start", lease=SECOND_LEASE)["t"] = int(1.7e9)


def completed_before_its_end(story: Story) -> None:
    story.find("end", lease=SECOND_LEASE)["t"] = int(2.3e9)


def gone_on_without_heartbeats(story: Story) -> None:
    story.lines = [
        line for line in story.lines if line["what"] != "db.heartbeat" or line["at"] < micros(1.1)
    ]
    story.find("end", lease=SECOND_LEASE)["t"] = int(4.5e9)
    story.find("db.move", new="completed").update(at=micros(4.6), now=micros(4.6))


def claimed_early(story: Story) -> None:
    story.find("db.move", attempt=2, new="running")["old_run_at"] = micros(1.9)


def claimed_after_expiry(story: Story) -> None:
    story.find("db.move", attempt=2, new="running")["expires_at"] = micros(1.7)


def claimed_after_cancellation(story: Story) -> None:
    story.find("db.move", attempt=2, new="running")["cancel_requested"] = True


def cancelled_and_nobody_asked(story: Story) -> None:
    story.drop("db.move", new="completed")
    story.moved(2.1, "running", "cancelled", kind="Cancelled")
    story.find("db.row").update(state="cancelled", has_result=False)


def expired_too_soon(story: Story) -> None:
    cancelled_and_nobody_asked(story)
    story.find("db.move", new="cancelled").update(kind="Expired", expires_at=micros(9.0))


def an_attempt_not_counted(story: Story) -> None:
    story.find("db.move", attempt=2, new="running")["attempt"] = 1


def a_failure_charged_twice(story: Story) -> None:
    story.find("db.move", old="running", new="pending")["failures"] = 2


def one_attempt_too_many(story: Story) -> None:
    story.find("db.move", old="running", new="pending")["max_attempts"] = 1


def due_again_too_soon(story: Story) -> None:
    story.find("db.move", old="running", new="pending")["run_at"] = micros(1.5)


def a_result_of_another_lease(story: Story) -> None:
    story.find("db.move", new="completed")["result_lease"] = FIRST_LEASE


def a_failure_of_another_lease(story: Story) -> None:
    move = story.find("db.move", old="running", new="pending")
    move["message"] = f"planned failure, lease={SECOND_LEASE}"


def a_result_of_another_payload(story: Story) -> None:
    story.find("db.row")["result_digest"] = "d2"


def completed_and_doomed(story: Story) -> None:
    story.find("submit.invoke")["recipe"] = "doom"


def a_message_left(story: Story) -> None:
    story.find("drained")["queues"] = [{"name": "asyncflow.tasks.default", "messages": 1}]


def hints_that_come_again_and_again(story: Story) -> None:
    story.find("drained")["redelivered"] = 2  # There were only two claims.


def a_process_that_would_not_stop(story: Story) -> None:
    story.find("process.ended")["status"] = -9


def a_process_that_ended_by_itself(story: Story) -> None:
    story.seen(3.0, "process.ended", who="worker-1", status=0, asked=False, final=False)


def read_backwards(story: Story) -> None:
    story.seen(2.3, "read", task=TASK, status=200, state="RUNNING", generation=1, attempt=2)


def not_found(story: Story) -> None:
    story.seen(2.3, "read", task=TASK, status=404, state=None, generation=None, attempt=None)


def a_settlement_only_in_the_log(story: Story) -> None:
    story.logs.append(
        {"event": "attempt.settled", "task_id": TASK, "attempt": 3, "outcome": "completed"}
    )


LIES: list[tuple[str, Change]] = [
    ("I1", lambda story: story.drop("db.row")),
    ("I1", refused_and_stored),
    ("I1", stored_twice),
    ("I1", lambda story: story.drop("submit.invoke")),
    ("I1", alive_at_the_end),
    ("I1", a_batch_in_part),
    ("I2", cancelled_after_completion),
    ("I2", a_gap),
    ("I2", a_redrive_nobody_asked_for),
    ("I2", lambda story: story.drop("db.move", new="completed")),
    ("I3", a_lease_given_twice),
    ("I3", taken_from_a_live_worker),
    ("I3", given_up_in_haste),
    ("I3", revived),
    ("I4", run_without_a_claim),
    ("I4", run_twice_under_one_lease),
    ("I4", run_before_its_claim),
    ("I4", completed_before_its_end),
    ("I4", gone_on_without_heartbeats),
    ("I5", claimed_early),
    ("I5", claimed_after_expiry),
    ("I5", claimed_after_cancellation),
    ("I5", cancelled_and_nobody_asked),
    ("I5", expired_too_soon),
    ("I6", an_attempt_not_counted),
    ("I6", a_failure_charged_twice),
    ("I6", one_attempt_too_many),
    ("I6", due_again_too_soon),
    ("I7", a_result_of_another_lease),
    ("I7", a_failure_of_another_lease),
    ("I7", a_result_of_another_payload),
    ("I7", completed_and_doomed),
    ("I13", a_message_left),
    ("I13", a_process_that_would_not_stop),
    ("I13", a_process_that_ended_by_itself),
    ("I14", read_backwards),
    ("I14", not_found),
    ("I15", a_settlement_only_in_the_log),
    ("I16", hints_that_come_again_and_again),
]


def test_a_true_history_passes(tmp_path: Path) -> None:
    """
    No violation is found, and the run proves something.
    """
    verdict = a_good_run().judged(tmp_path)

    assert [] == verdict.violations
    assert [] == verdict.shortcomings
    assert checker.PASSED == verdict.status


@pytest.mark.parametrize(
    ("invariant", "lie"),
    [pytest.param(i, lie, id=f"{i}-{lie.__name__}-{n}") for n, (i, lie) in enumerate(LIES)],
)
def test_a_lie_is_found(invariant: str, lie: Change, tmp_path: Path) -> None:
    """
    A lie is reported under the invariant that it violates, possibly among others.
    """
    story = a_good_run()
    lie(story)

    verdict = story.judged(tmp_path)

    assert invariant in {violation.invariant for violation in verdict.violations}
    assert checker.VIOLATED == verdict.status


def test_every_invariant_has_a_lie() -> None:
    """
    Every invariant is violated by some test; otherwise it might check nothing.
    """
    assert set(checker.INVARIANTS) == {invariant for invariant, _ in LIES}


def test_a_zombie_that_is_fenced_is_no_violation(tmp_path: Path) -> None:
    """
    A worker that is declared dead may go on: another one completes the task, and what the zombie
    does later is discarded.
    """
    story = a_good_run()
    lost = story.find("db.move", old="running", new="pending")
    lost.update(kind="WorkerLost", message="died", run_at=lost["now"], old_worker=OTHER_WORKER)
    story.heartbeats(OTHER_WORKER, 1.1)
    story.lines[-1]["seq"] = 0
    story.gone(1.45, OTHER_WORKER)["seq"] = 0.5
    story.find("db.move", attempt=1, new="running")["worker"] = OTHER_WORKER
    story.find("start", lease=FIRST_LEASE)["pid"] = 8
    story.find("end", lease=FIRST_LEASE).update(pid=8, how="returned", t=int(6.9e9))
    story.fault("pause", 1.35, 6.8)
    story.logs = story.logs[1:]

    assert [] == story.judged(tmp_path).violations


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda s: s.plan.update(kinds=["kill"]), id="a-fault-never-came"),
        pytest.param(lambda s: s.drop("drained"), id="no-end"),
    ],
)
def test_a_run_that_proves_nothing_is_invalid(change: Change, tmp_path: Path) -> None:
    """
    A run without violations is still invalid if a planned fault or its end is missing.
    """
    story = a_good_run()
    change(story)

    verdict = story.judged(tmp_path)

    assert [] == verdict.violations
    assert checker.INVALID == verdict.status


def test_a_fault_that_missed_proves_nothing(tmp_path: Path) -> None:
    """
    Each planned fault must take effect at least once.
    """
    story = a_good_run()
    story.plan["kinds"] = ["reset-postgres"]
    story.fault("reset-postgres", 1, 2, evidence=0)

    assert ["fault reset-postgres never took effect"] == story.judged(tmp_path).shortcomings


def test_a_violation_comes_with_the_story_of_its_task(tmp_path: Path) -> None:
    """
    The timeline shows clients, database and handlers in one order, in readable form.
    """
    story = a_good_run()
    a_result_of_another_lease(story)
    story.judged(tmp_path)
    [told] = story.onlooker.timelines.values()

    who = [line[13:].split()[0] for line in told]
    assert ["client", "database", "client", "database", "handler"] == who[:5]
    assert any(
        "running → completed" in line and "result of lease aaaaaaaa" in line for line in told
    )


def test_the_checker_reads_files_and_nothing_else(tmp_path: Path) -> None:
    """
    The checker imports nothing of AsyncFlow, runs standalone, and stays short enough to be read.
    """
    file = Path(checker.__file__)
    imported = {
        name
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    a_good_run().judged(tmp_path)
    done = subprocess.run([sys.executable, "-I", file, tmp_path], capture_output=True, text=True)

    assert not any(name.startswith("asyncflow") for name in imported)
    assert len(file.read_text().splitlines()) < 600
    assert (0, "passed") == (done.returncode, done.stdout.strip()), done.stderr


def test_the_checkers_table_is_ours() -> None:
    """
    The checker has its own copy of the transition table on purpose; this test compares the two.
    """
    moves = {
        (str(state), str(target))
        for state, events in TRANSITIONS.items()
        for target in events.values()
    }

    assert moves == checker.TABLE
    assert {str(state) for state in TERMINAL} == checker.TERMINAL
