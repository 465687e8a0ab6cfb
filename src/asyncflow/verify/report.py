"""
The report of a run, as JSON for programs and Markdown for people.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from asyncflow.verify.checker import (
    INVARIANTS,
    VERDICTS,
    Histories,
    Judgement,
    Line,
    TaskHistory,
    Violation,
    judge,
)
from asyncflow.verify.figures import Figures
from asyncflow.verify.timeline import timeline

SHOWN_MAX = 10
VIOLATIONS_MAX = 1_000

NOT_IN_THIS_VERSION = {
    "I8": "idempotency keys",
    "I9": "tenants and their limits",
    "I10": "ordering keys",
    "I11": "schedules",
    "I12": "webhooks",
}


class Onlooker:
    """
    Sees every task while it is judged: counts the figures, and keeps the timeline of one task for
    each violated invariant.
    """

    def __init__(self, histories: Histories) -> None:
        self.figures = Figures(histories)
        self.timelines: dict[str, list[str]] = {}
        self._histories = histories
        self._told: set[str] = set()

    def look(self, task: TaskHistory, violations: list[Violation]) -> None:
        """
        Include a task.
        """
        self.figures.look(task)
        news = {violation.invariant for violation in violations} - self._told
        if news:
            self._told |= news
            self.timelines[task.id] = timeline(self._histories, task)


def write(folder: Path) -> tuple[Judgement, str]:
    """
    Judge a run and leave `report.json` and `report.md` in its folder.

    Returns:
        The verdict, and the report for people.
    """
    histories = Histories(folder)
    onlooker = Onlooker(histories)
    verdict = judge(histories, onlooker.look)
    facts: dict[str, Any] = {
        "verdict": VERDICTS[verdict.status],
        "plan": histories.plan,
        "figures": onlooker.figures.result(fenced=verdict.fenced),
        "invariants": _counts(verdict),
        "shortcomings": verdict.shortcomings,
        "violations": [
            {"invariant": v.invariant, "fact": v.fact, "task": v.task}
            for v in verdict.violations[:VIOLATIONS_MAX]
        ],
        "timelines": onlooker.timelines,
    }
    (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    text = "\n".join(_as_markdown(facts)) + "\n"
    (folder / "report.md").write_text(text)
    return verdict, text


def _counts(verdict: Judgement) -> dict[str, int]:
    found = Counter(v.invariant for v in verdict.violations)
    return {invariant: found[invariant] for invariant in INVARIANTS}


def _as_markdown(facts: dict[str, Any]) -> list[str]:
    plan, counted = facts["plan"], facts["figures"]
    lines = [
        f"# AsyncFlow {plan['versions']['asyncflow']}: {facts['verdict']}",
        "",
        _setting(plan, counted),
        "",
        _summary(counted),
        "",
    ]
    if facts["shortcomings"]:
        lines += ["This run proves nothing:", ""]
        lines += [f"- {reason}" for reason in facts["shortcomings"]] + [""]
    lines += ["| | invariant | violations |", "|---|---|---:|"]
    lines += [f"| {i} | {INVARIANTS[i]} | {n} |" for i, n in facts["invariants"].items()]
    absent = ", ".join(f"{i} ({what})" for i, what in NOT_IN_THIS_VERSION.items())
    lines += ["", f"Not in this version: {absent}.", ""]
    lines += _fault_table(plan, counted) + _rerun_table(counted)
    for violation in facts["violations"][:SHOWN_MAX]:
        place = f" (task {violation['task']})" if violation["task"] else ""
        lines += ["", f"**{violation['invariant']}**: {violation['fact']}{place}"]
    for task, story in facts["timelines"].items():
        lines += ["", f"Task {task}:", "", "```text", *story, "```"]
    return lines


def _setting(plan: Line, counted: Line) -> str:
    mutant = f", mutant `{plan['mutant']}`" if plan["mutant"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    return (
        f"Seed {plan['seed']}, engine {plan['engine']}{mutant}, {plan['seconds']:g} s of faults, "
        f"{plan['rate']:g} tasks per second offered, lease {plan['lease_seconds']:g} s; "
        f"{versions}, {plan['cores']} cores ({counted['idle_share']} idle)."
    )


def _summary(counted: Line) -> str:
    return (
        f"{counted['accepted']} tasks accepted ({counted['accepted_per_second']} per second), "
        f"**{counted['lost']} lost**; {counted['refused']} refused; "
        f"{counted['unknown']} submissions of unknown outcome, {counted['recovered']} of them "
        f"stored; {counted['transitions']} transitions, {counted['executions']} executions, "
        f"{counted['duplicates']} of them wasted; {counted['fenced']} attempts fenced; "
        f"{counted['workers_lost']} workers declared dead, {counted['leases_reaped']} leases "
        f"reaped; all tasks had ended {counted['drain_seconds']} s after the last fault."
    )


def _fault_table(plan: Line, counted: Line) -> list[str]:
    lines = [
        "Seconds from the end of a fault until a task completed:",
        "",
        "| fault | times | effective | p50 | p99 | max |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind, found in counted["faults"].items():
        lines.append(f"| {kind} | {found['times']} | {found['bit']} | {_cells(found)} |")
    untried = sorted({*plan["all_kinds"]} - {*counted["faults"]})
    return lines + (["", f"Not tried: {', '.join(untried)}."] if untried else [])


def _rerun_table(counted: Line) -> list[str]:
    if not counted["reruns"]:
        return []
    heading = (
        "Seconds from the fault on a worker until its tasks were released, and until they started "
        "again, behind those already waiting; without tasks whose backoff makes them wait:"
    )
    lines = [
        "",
        heading,
        "",
        "| fault | PostgreSQL | tasks | released: p50 | p99 | max | started: p50 | p99 | max |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for found in counted["reruns"]:
        database = "was down meanwhile" if found["in_outage"] else "was up"
        cells = f"{_cells(found['freed'])} | {_cells(found['begun'])}"
        lines.append(f"| {found['kind']} | {database} | {found['tasks']} | {cells} |")
    return lines


def _cells(found: Line) -> str:
    return " | ".join(str(found.get(f"{name}_seconds", "")) for name in ("p50", "p99", "max"))
