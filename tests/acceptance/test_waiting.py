"""
Tasks that wait: for their time, their turn, their queue, or a worker that offers their name; and
what ends the wait.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.support.process import is_gone
from tests.support.system import System

pytestmark = pytest.mark.asyncio(loop_scope="module")

NEWER_HANDLERS = Path(__file__).with_name("newer_handlers.py")


async def test_a_delayed_task_does_not_start_before_its_time(shared: System) -> None:
    """
    `delay_seconds` and `run_at` are kept by the database's clock, to within a second.
    """
    run_at = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
    delayed = await shared.submit("work", delay_seconds=1)
    timed = await shared.submit("work", run_at=run_at)
    assert "SCHEDULED" == (await shared.get(delayed))["status"]

    tasks = [await shared.finishes(delayed), await shared.finishes(timed)]

    for task in tasks:
        due, started = (datetime.fromisoformat(task[name]) for name in ("run_at", "started_at"))
        assert timedelta(0) <= started - due < timedelta(seconds=1.5)


async def test_a_task_that_waits_can_be_run_now(shared: System) -> None:
    """
    A task can be run now before its time and between two attempts; its attempt count continues.
    """
    scheduled = await shared.submit("work", delay_seconds=3600)
    retrying = await shared.submit("picky", {"after_seconds": 3600})
    await shared.reaches(retrying, "RETRYING")

    answers = [await shared.post(task_id, "run-now") for task_id in (scheduled, retrying)]

    assert [202, 202] == [answer.status_code for answer in answers]
    assert "COMPLETED" == (await shared.finishes(scheduled))["status"]
    outcomes = [a["outcome"] for a in (await shared.finishes(retrying))["attempts"]]
    assert ["RETRIED", "FAILED"] == outcomes


async def test_a_task_that_expires_before_it_starts_never_runs(shared: System) -> None:
    """
    `expires_at` cancels a task that is still waiting, and the task says so.
    """
    expires_at = (datetime.now(UTC) + timedelta(seconds=0.5)).isoformat()
    task_id = await shared.submit("work", queue="nobody-consumes", expires_at=expires_at)

    task = await shared.finishes(task_id)

    assert "CANCELLED" == task["status"]
    assert "Expired" == task["error"]["kind"]
    assert [] == shared.journal.entries(task_id)


async def test_a_waiting_task_is_cancelled_immediately(shared: System) -> None:
    """
    Cancelling a task that has not started is answered with CANCELLED; it never runs.
    """
    task_id = await shared.submit("work", delay_seconds=1)

    response = await shared.post(task_id, "cancel")

    assert 200 == response.status_code
    assert "CANCELLED" == response.json()["status"]
    after = await shared.submit("work", delay_seconds=1)
    await shared.finishes(after)
    assert [] == shared.journal.entries(task_id)


@pytest.mark.any_engine
async def test_a_running_coroutine_is_cancelled(shared: System) -> None:
    """
    Cancelling a running `async def` handler is answered 202; its worker stops it.
    """
    task_id = await shared.submit("work", {"seconds": 60})
    await shared.journal.wait_for("start", task_id)

    response = await shared.post(task_id, "cancel")
    assert 202 == response.status_code
    task = await shared.finishes(task_id, timeout_seconds=5)

    assert "CANCELLED" == task["status"]
    assert task["cancel_requested_at"] is not None
    assert ["CANCELLED"] == [a["outcome"] for a in task["attempts"]]
    assert [] == shared.journal.entries(task_id, what="end")


@pytest.mark.any_engine
async def test_a_deaf_child_process_is_killed_when_its_task_is_cancelled(
    shared: System,
) -> None:
    """
    The child process of a cancelled task is killed if it does not stop within the grace period.
    """
    task_id = await shared.submit("work-in-process", {"seconds": 60})
    start = await shared.journal.wait_for("start", task_id)

    await shared.post(task_id, "cancel")
    task = await shared.finishes(task_id, timeout_seconds=8)

    assert "CANCELLED" == task["status"]
    await shared.until(lambda: is_gone(start.pid), "the child is gone")


async def test_a_task_nobody_offers_says_what_it_waits_for_and_runs_later(
    shared: System,
) -> None:
    """
    A task whose name no live worker offers is accepted, and runs once such a worker starts.
    """
    task_id = await shared.submit("novelty")
    waiting = await shared.get(task_id)
    assert "PENDING" == waiting["status"]
    assert "No live worker offers 'novelty'" in waiting["waiting_for"]

    newer = await shared.start_worker(handlers=[NEWER_HANDLERS])
    task = await shared.finishes(task_id)
    await newer.end()

    assert "COMPLETED" == task["status"]
    assert "new" == task["result"]
    assert 1 == task["attempt"]


async def test_a_task_waits_in_the_queue_of_its_handler(shared: System) -> None:
    """
    The queue a handler declares is used unless the submitter names another.
    """
    usual = await shared.submit("sidelined")
    chosen = await shared.submit("sidelined", queue="default")

    tasks = [await shared.finishes(usual), await shared.finishes(chosen)]

    assert ["COMPLETED", "COMPLETED"] == [task["status"] for task in tasks]
    assert ["side-lane", "default"] == [task["queue"] for task in tasks]


async def test_a_paused_queue_accepts_tasks_and_starts_none(shared: System) -> None:
    """
    `asyncflow queue pause` acts immediately, and `resume` lets the waiting tasks run.
    """
    await shared.command("queue", "pause", "side-lane")
    task_id = await shared.submit("sidelined")
    other = await shared.submit("work", delay_seconds=0.3)
    await shared.finishes(other)
    paused = await shared.get(task_id)
    assert "PENDING" == paused["status"]
    assert paused["waiting_for"].startswith("Queue 'side-lane' is paused")

    await shared.command("queue", "resume", "side-lane")

    assert "COMPLETED" == (await shared.finishes(task_id))["status"]


async def test_an_urgent_task_overtakes_a_backlog(shared: System) -> None:
    """
    A task of higher priority goes first: it waits for what is running or in flight, not for the
    backlog.
    """
    backlog = await shared.submit_batch(
        [{"name": "work", "payload": {"seconds": 0.03}, "queue": "lane", "priority": 0}] * 80
    )
    worker = await shared.start_worker("--queues", "lane", "--slots", "1")
    await shared.journal.wait_for("start", backlog[0])

    urgent = await shared.submit("work", queue="lane", priority=9)

    assert {"completed": 81} == await shared.all_terminal([*backlog, urgent])
    await worker.end()
    members = {*backlog, urgent}
    order = [e.task_id for e in shared.journal.entries(what="start") if e.task_id in members]
    assert order.index(urgent) < 40
