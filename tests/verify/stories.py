"""
Hand-written histories: what the processes of a run would have recorded about a task, true or false.

A `Story` starts as a complete run of one task that fails once, completes in its second attempt, and
is read meanwhile. Tests change a line and check what the checker reports.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncflow.verify.checker import Histories, Judgement, judge
from asyncflow.verify.report import Onlooker

Line = dict[str, Any]

TASK = "01a20cc6-2f47-7000-9ea2-000000000001"
WORKER, OTHER_WORKER = "worker-a", "worker-b"
PIDS = {WORKER: 7, OTHER_WORKER: 8}
FIRST_LEASE, SECOND_LEASE = (
    "aaaaaaaa-0000-4000-8000-000000000001",
    "bbbbbbbb-0000-4000-8000-000000000002",
)
LEASE_SECONDS, HEARTBEAT_SECONDS = 2.0, 0.4
WALL_MINUS_MONOTONIC = 1_000_000_000_000

PLAN: Line = {
    "kinds": [],
    "lease_seconds": LEASE_SECONDS,
    "heartbeat_seconds": HEARTBEAT_SECONDS,
    "backoff": [0.2, 1.0],
}


class Story:
    """
    The recorded lines of a run; times are seconds since its start.

    Attributes:
        onlooker: The onlooker that watched the check; set by `judged`.
    """

    onlooker: Onlooker

    def __init__(self) -> None:
        self.plan = dict(PLAN)
        self.lines: list[Line] = []
        self.logs: list[Line] = []
        self._seq = 0

    def seen(self, at: float, what: str, **fields: Any) -> Line:
        """
        Add a line recorded by a process.
        """
        return self._add({"t": int(at * 1e9), "what": what, **fields})

    def recorded(self, at: float, what: str, **fields: Any) -> Line:
        """
        Add a line recorded by the database.
        """
        self._seq += 1
        return self._add({"at": micros(at), "what": what, "seq": self._seq, **fields})

    def moved(self, at: float, old: str, new: str, **fields: Any) -> Line:
        """
        Add a transition; other fields stay as they were at the previous transition.
        """
        before = next((line for line in reversed(self.lines) if line["what"] == "db.move"), START)
        line = {
            **{"old_" + k: before[k] for k in ("lease", "worker", "attempt", "failures", "run_at")},
            "old_generation": before["generation"],
            **{k: before[k] for k in START},
            "old": old,
            "new": new,
            "task": TASK,
            "now": micros(at),
            "kind": None,
            "message": None,
            "result_lease": None,
            **fields,
        }
        return self.recorded(at, "db.move", **line)

    def heartbeats(self, worker: str, *moments: float) -> None:
        """
        Add a worker's heartbeats; the first one registers it.
        """
        for at in moments:
            self.recorded(at, "db.heartbeat", **of_worker(worker))

    def gone(self, at: float, worker: str, *, how: str = "lost", silent: float = 2.5) -> Line:
        """
        Record that a worker was declared dead, or stopped (`how`).
        """
        return self.recorded(at, f"db.{how}", silent_micros=int(silent * 1e6), **of_worker(worker))

    def fault(self, kind: str, begin: float, end: float, *, pid: int = 8, **fields: Any) -> None:
        """
        Add a fault of the nemesis.
        """
        of_it = {"kind": kind, "target": "worker-2", "pid": pid}
        self.seen(begin, "fault.start", **of_it)
        more = {"evidence": 1, "detail": "", **fields}
        self.seen(end, "fault.end", seconds=end - begin, **of_it, **more)

    def ran(self, lease: str, begin: float, end: float, *, attempt: int, how: str) -> None:
        """
        Add an execution, as recorded by its handler.
        """
        of_it = {"task": TASK, "lease": lease, "attempt": attempt, "pid": 7, "isolation": "loop"}
        self.seen(begin, "start", **of_it)
        self.seen(end, "end", how=how, **of_it)

    def find(self, what: str, number: int = 0, **fields: Any) -> Line:
        """
        Find a line, for a test to change.
        """
        return [
            line for line in self.lines if line["what"] == what and fields.items() <= line.items()
        ][number]

    def drop(self, what: str, **fields: Any) -> None:
        """
        Remove all matching lines.
        """
        self.lines = [
            line
            for line in self.lines
            if not (line["what"] == what and fields.items() <= line.items())
        ]

    def judged(self, folder: Path) -> Judgement:
        """
        Run the checker on this story and return its verdict.
        """
        for name in ("history", "logs"):
            (folder / name).mkdir()
        (folder / "plan.json").write_text(json.dumps(self.plan))
        _write(folder / "history" / "all.jsonl", self.lines)
        _write(folder / "logs" / "worker-1.log", self.logs)
        histories = Histories(folder)
        self.onlooker = Onlooker(histories)
        return judge(histories, self.onlooker.look)

    def _add(self, line: Line) -> Line:
        self.lines.append(line)
        return line


def of_worker(worker: str) -> Line:
    """
    The fields that the database records for a worker.
    """
    return {
        "worker": worker,
        "name": f"host:{PIDS[worker]}",
        "lease_seconds": LEASE_SECONDS,
        "heartbeat_seconds": HEARTBEAT_SECONDS,
    }


def micros(at: float) -> int:
    """
    A time on the database's clock, in microseconds.
    """
    return int(at * 1e6) + WALL_MINUS_MONOTONIC


START: Line = {
    "lease": None,
    "worker": None,
    "attempt": 0,
    "failures": 0,
    "run_at": micros(1.0),
    "generation": 1,
    "max_attempts": 5,
    "cancel_requested": False,
    "expires_at": None,
}


def a_good_run() -> Story:
    """
    A complete run without a violation.
    """
    story = Story()
    for second in range(8):
        story.seen(second, "clock", wall_us=second * 1_000_000 + WALL_MINUS_MONOTONIC)
    story.seen(0, "phase", phase="calm")
    story.heartbeats(WORKER, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
    story.seen(1.0, "submit.invoke", n=1, recipe="fail", digest="d1", times=1)
    story.recorded(1.0, "db.submit", task=TASK, new="pending", attempt=0, generation=1)
    story.seen(1.1, "submit.ok", n=1, task=TASK)
    claimed = {"worker": WORKER, "lease": FIRST_LEASE, "attempt": 1}
    story.moved(1.2, "pending", "running", **claimed)
    story.ran(FIRST_LEASE, 1.3, 1.4, attempt=1, how="raised")
    story.moved(
        1.5,
        "running",
        "pending",
        lease=None,
        worker=None,
        failures=1,
        run_at=micros(1.75),
        kind="PlannedFailure",
        message=f"planned failure, lease={FIRST_LEASE}",
    )
    story.seen(1.6, "read", task=TASK, status=200, state="RETRYING", generation=1, attempt=1)
    again = {"worker": WORKER, "lease": SECOND_LEASE, "attempt": 2}
    story.moved(1.8, "pending", "running", **again)
    story.ran(SECOND_LEASE, 1.9, 2.0, attempt=2, how="returned")
    story.moved(2.1, "running", "completed", result_lease=SECOND_LEASE)
    story.seen(2.2, "read", task=TASK, status=200, state="COMPLETED", generation=1, attempt=2)
    settled = {"event": "attempt.settled", "task_id": TASK}
    story.logs.append({**settled, "attempt": 1, "outcome": "retried"})
    story.logs.append({**settled, "attempt": 2, "outcome": "completed"})
    story.gone(5.0, WORKER, how="stopped", silent=0.2)
    story.seen(4.0, "drained", unfinished=0, queues=[], redelivered=1)
    story.seen(4.1, "phase", phase="stopping")
    story.seen(5.1, "process.ended", who="worker-1", status=0, asked=True, final=True)
    story.recorded(6.0, "db.row", **a_row())
    return story


def a_row(**changes: Any) -> Line:
    """
    The task's row at the end of the run.
    """
    row: Line = {
        "task": TASK,
        "state": "completed",
        "attempt": 2,
        "generation": 1,
        "failures": 1,
        "lease": SECOND_LEASE,
        "submission": 1,
        "has_result": True,
        "result_submission": 1,
        "result_digest": "d1",
        "result_lease": SECOND_LEASE,
        "result_attempt": 2,
        "result_blob": None,
    }
    return row | changes


Change = Callable[[Story], Any]


def _write(file: Path, lines: list[Line]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
