"""
Tasks that do not simply complete: retries, dead letters, redrives, poison tasks.
"""

from __future__ import annotations

import pytest

from tests.support.system import System

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_failing_task_is_retried_with_growing_waits(shared: System) -> None:
    """
    Every failed attempt stays in the history, and the waits between attempts grow as declared.
    """
    task_id = await shared.submit("flaky", {"failures": 2})

    retrying = await shared.reaches(task_id, "RETRYING")
    assert "ConnectionError" == retrying["error"]["kind"]
    task = await shared.finishes(task_id)

    assert "COMPLETED" == task["status"]
    assert {"attempt": 3} == task["result"]
    assert 2 == task["failures"]
    assert ["RETRIED", "RETRIED", "COMPLETED"] == [a["outcome"] for a in task["attempts"]]
    starts = [entry.time for entry in shared.journal.entries(task_id, what="start")]
    first, second = starts[1] - starts[0], starts[2] - starts[1]
    # The backoff is 0.2 and 0.4 seconds; a due task may be noticed half a second late.
    assert 0.2 <= first < 1.5
    assert 0.4 <= second < 1.7


async def test_a_dead_letter_tells_why_and_where(shared: System) -> None:
    """
    A task without attempts left is FAILED, with the exception and its traceback.
    """
    task_id = await shared.submit("broken")

    task = await shared.finishes(task_id)

    assert "FAILED" == task["status"]
    assert task["result"] is None
    assert "LookupError" == task["error"]["kind"]
    assert "nothing to find" == task["error"]["message"]
    assert "_find_the_fault" in task["error"]["traceback"]
    assert ["RETRIED", "FAILED"] == [a["outcome"] for a in task["attempts"]]
    listed = await shared.client.get(
        f"{shared.url}/tasks", params={"status": "FAILED", "name": "broken"}
    )
    assert task_id in [listed_task["id"] for listed_task in listed.json()["tasks"]]


async def test_a_redriven_dead_letter_completes_in_a_new_generation(shared: System) -> None:
    """
    A redrive gives a failed task a fresh set of attempts and keeps its history.
    """
    task_id = await shared.submit("broken", {"until_attempt": 4})
    await shared.finishes(task_id)

    response = await shared.post(task_id, "redrive")
    assert 202 == response.status_code
    task = await shared.finishes(task_id)

    assert "COMPLETED" == task["status"]
    assert 2 == task["generation"]
    assert [
        (1, "RETRIED"),
        (1, "FAILED"),
        (2, "RETRIED"),
        (2, "COMPLETED"),
    ] == [(a["generation"], a["outcome"]) for a in task["attempts"]]


async def test_a_completed_task_is_neither_cancelled_nor_redriven(shared: System) -> None:
    """
    Terminal states do not flip; the refusal names the state.
    """
    task_id = await shared.submit("work")
    await shared.finishes(task_id)

    for verb in ("cancel", "redrive"):
        response = await shared.post(task_id, verb)

        assert 409 == response.status_code
        assert "COMPLETED" == response.json()["state"]


async def test_a_handler_may_ask_for_a_retry_and_reject_the_task(shared: System) -> None:
    """
    `Retry` waits as long as it says; `Reject` fails the task even with attempts left.
    """
    task_id = await shared.submit("picky", {"after_seconds": 0.5})

    task = await shared.finishes(task_id)

    assert "FAILED" == task["status"]
    assert "not for me" == task["error"]["message"]
    assert ["RETRIED", "FAILED"] == [a["outcome"] for a in task["attempts"]]
    first, second = shared.journal.entries(task_id, what="start")
    assert 0.5 <= second.time - first.time < 2.0


@pytest.mark.any_engine
async def test_an_attempt_that_takes_too_long_is_stopped(shared: System) -> None:
    """
    A timeout ends an attempt in every isolation, even if the handler ignores cancellation.
    """
    names = ("work", "work-in-thread", "work-in-process")
    limits = {"timeout_seconds": 0.3, "max_attempts": 1}
    task_ids = [await shared.submit(name, {"seconds": 3}, **limits) for name in names]

    tasks = [await shared.finishes(task_id) for task_id in task_ids]

    assert ["FAILED"] * 3 == [task["status"] for task in tasks]
    assert ["TimedOut"] * 3 == [task["error"]["kind"] for task in tasks]


@pytest.mark.any_engine
async def test_a_task_that_kills_its_child_process_fails_and_hurts_nobody(
    shared: System,
) -> None:
    """
    A poison task in a child process ends FAILED after its attempts; its neighbours complete.
    """
    poison = await shared.submit("kill-child")
    neighbours = [await shared.submit("work-in-process", {"seconds": 0.2}) for _ in range(4)]

    task = await shared.finishes(poison)

    assert "FAILED" == task["status"]
    assert "Crashed" == task["error"]["kind"]
    assert "status 9" in task["error"]["message"]
    assert 3 == len(task["attempts"])
    assert {"completed": 4} == await shared.all_terminal(neighbours)
    assert [(await shared.get(task_id))["attempt"] for task_id in neighbours] == [1] * 4
