"""
What a run reports besides its verdict, computed from hand-written histories.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.verify.stories import FIRST_LEASE, OTHER_WORKER, TASK, Story, a_good_run


def a_run_with_a_loss(kind: str = "kill-worker") -> Story:
    """
    The first attempt's worker is hit 0.05 s after its claim and declared dead; another one claims
    the task 0.55 s after that.
    """
    story = a_good_run()
    story.heartbeats(OTHER_WORKER, 1.1)
    story.lines[-1]["seq"] = 0
    story.gone(1.45, OTHER_WORKER)["seq"] = 0.5
    story.find("db.move", attempt=1, new="running")["worker"] = OTHER_WORKER
    lost = story.find("db.move", old="running", new="pending")
    lost.update(kind="WorkerLost", message="died", run_at=lost["now"], old_worker=OTHER_WORKER)
    story.find("start", lease=FIRST_LEASE)["pid"] = 8
    story.find("end", lease=FIRST_LEASE)["pid"] = 8
    story.logs = story.logs[1:]
    story.fault(kind, 1.25, 1.3)
    return story


def figures_of(story: Story, folder: Path) -> dict[str, Any]:
    """
    The figures of a story, which must have no violations.
    """
    verdict = story.judged(folder)
    assert [] == verdict.violations
    return story.onlooker.figures.result(fenced=verdict.fenced)


def test_recovery_counts_from_the_moment_a_worker_was_hit(tmp_path: Path) -> None:
    """
    Recovery is measured from the fault to the release of the task, and to its next start.
    """
    [rerun] = figures_of(a_run_with_a_loss(), tmp_path)["reruns"]

    assert ("kill-worker", False, 1) == (rerun["kind"], rerun["in_outage"], rerun["tasks"])
    assert pytest.approx(0.25) == rerun["freed"]["max_seconds"]
    assert pytest.approx(0.55) == rerun["begun"]["max_seconds"]


def test_recovery_is_attributed_to_the_fault_that_caused_it(tmp_path: Path) -> None:
    """
    The recovery names the fault that hit the worker, not an earlier or later one, nor one on
    another process.
    """
    story = a_run_with_a_loss("pause")
    story.fault("kill-worker", 0.2, 0.3)
    story.fault("kill-worker", 1.26, 1.3, pid=99)
    story.fault("kill-worker", 1.6, 1.7)

    [rerun] = figures_of(story, tmp_path)["reruns"]

    assert "pause" == rerun["kind"]


def test_a_loss_without_a_fault_says_nothing_about_recovery(tmp_path: Path) -> None:
    """
    A worker that sent heartbeats long after its only fault was not lost because of it.
    """
    story = a_run_with_a_loss()
    for line in story.lines:
        if line["what"].startswith("fault"):
            line["t"] -= int(1.0e9)

    assert [] == figures_of(story, tmp_path)["reruns"]


def test_recovery_during_an_outage_of_postgresql_is_reported_separately(tmp_path: Path) -> None:
    """
    Recovery during an outage is reported separately: it measures the outage, not AsyncFlow.
    """
    story = a_run_with_a_loss()
    story.fault("postgres-crash", 1.35, 1.4)

    [rerun] = figures_of(story, tmp_path)["reruns"]

    assert rerun["in_outage"]


def test_a_task_that_has_to_wait_says_nothing_about_recovery(tmp_path: Path) -> None:
    """
    A task that is in backoff after an earlier failure does not count as a recovery.
    """
    story = a_run_with_a_loss()
    story.find("db.move", old="running", new="pending")["run_at"] += 100_000

    assert [] == figures_of(story, tmp_path)["reruns"]


def test_wasted_executions_are_counted(tmp_path: Path) -> None:
    """
    The attempt of the lost worker counts as wasted, and no other.
    """
    found = figures_of(a_run_with_a_loss(), tmp_path)

    assert (2, 1, 1) == (found["executions"], found["duplicates"], found["leases_reaped"])
    assert (1, 0) == (found["accepted"], found["lost"])


def test_only_an_attempt_whose_lease_was_taken_away_counts_as_fenced(tmp_path: Path) -> None:
    """
    An attempt counts as fenced only if its lease was reaped, not if its outcome was recorded and
    its worker called it void.
    """
    story = a_run_with_a_loss()
    void = {"event": "attempt.void", "task_id": TASK}
    story.logs += [{**void, "attempt": 1}, {**void, "attempt": 2}]

    assert 1 == figures_of(story, tmp_path)["fenced"]
