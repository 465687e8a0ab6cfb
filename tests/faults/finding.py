"""
The observations of a case, and the verdict on them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from tests.faults.cases import GONE, Case


class Row(NamedTuple):
    """
    A task at the end of a case.

    Attributes:
        result: The attempt that produced its result; None if the result names no attempt.
    """

    state: str
    attempt: int
    result: int | None


@dataclass(slots=True)
class Facts:
    """
    What was observed.

    Attributes:
        fired: Whether the failpoint fired.
        seconds: Time from the failure until every task had reached its expected state.
        victim: What happened to the process that failed, for the report.
        accepted: Tasks answered 202, or stored for the case.
        rows: Each task of the case that exists.
        starts: How often each task's handler started.
        afterwards: The state of a task submitted later, and the expected one.
        left: Unfinished tasks, of the case or later.
        hints: Messages left in RabbitMQ.
        statuses: The exit status of each process that was asked to stop.
        trouble: What kept the case from running to its end.
    """

    fired: bool = False
    seconds: float | None = None
    victim: str = "went on"
    accepted: list[UUID] = field(default_factory=list)
    rows: dict[UUID, Row] = field(default_factory=dict)
    starts: Counter[UUID] = field(default_factory=Counter)
    afterwards: tuple[str, str] = ("", "")
    left: int = 0
    hints: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    trouble: str = ""


def judge(case: Case, facts: Facts) -> list[str]:
    """
    Compare the facts with what must hold; return what is wrong, empty if all is well.
    """
    if not facts.fired:
        return [f"did not bite: {facts.trouble}"]
    if facts.trouble:
        return [facts.trouble]
    return [*_wrong_tasks(case, facts), *_wrong_elsewhere(case, facts)]


def _wrong_tasks(case: Case, facts: Facts) -> list[str]:
    faults = []
    for task_id in facts.accepted:
        if case.state == GONE and task_id in facts.rows:
            faults.append(f"task {task_id} is still there")
        if case.state != GONE and task_id not in facts.rows:
            faults.append(f"task {task_id} was accepted and is missing")
    for task_id, row in facts.rows.items():
        starts = facts.starts[task_id]
        if row.state != case.state:
            faults.append(f"task {task_id} is {row.state}")
        if not case.starts_min <= starts <= case.starts_max:
            faults.append(f"the handler of task {task_id} started {starts} times")
        if row.result not in (None, row.attempt):
            faults.append(f"task {task_id} has the result of attempt {row.result}")
    return faults


def _wrong_elsewhere(case: Case, facts: Facts) -> list[str]:
    faults = []
    if facts.seconds is None or facts.seconds > case.seconds:
        faults.append(f"it took {facts.seconds} s")
    state, wanted = facts.afterwards
    if state != wanted:
        faults.append(f"a task that came later is {state}")
    if facts.left:
        faults.append(f"{facts.left} tasks are not finished")
    if facts.hints:
        faults.append(f"{facts.hints} messages are left in RabbitMQ")
    faults += [f"{name} ended with {status}" for name, status in facts.statuses.items() if status]
    return faults


@dataclass(frozen=True, slots=True)
class Finding:
    """
    A case and its verdict.

    Attributes:
        tails: The last output of its processes, if something is wrong.
    """

    case: Case
    facts: Facts
    faults: list[str]
    tails: str = ""

    def line(self) -> str:
        """
        The finding's line in the report.
        """
        case, facts = self.case, self.facts
        seconds = "-" if facts.seconds is None else f"{facts.seconds:.1f}"
        starts = ",".join(str(facts.starts[task_id]) for task_id in facts.rows) or "-"
        verdict = "; ".join(self.faults) or "held"
        return LINE.format(
            *(case.engine, case.point, case.action, facts.victim),
            *(case.state, starts, seconds, verdict),
        )


LINE = "{:9} {:27} {:13} {:14} {:10} {:>6} {:>8}  {}"
HEAD = LINE.format(
    *("engine", "point", "action", "the process", "state", "starts", "seconds", "verdict")
)
