"""
What a run came to, as JSON for programs and Markdown for people.
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
    Line,
    Verdict,
    judge,
)
from asyncflow.verify.figures import figures

SHOWN_MAX = 10

NOT_IN_THIS_VERSION = {
    "I8": "idempotency keys",
    "I9": "tenants and their limits",
    "I10": "ordering keys",
    "I11": "schedules",
    "I12": "webhooks",
}


def write(folder: Path) -> tuple[Verdict, str]:
    """
    Judge a run and leave `report.json` and `report.md` in its folder.

    Returns:
        The verdict, and the report for people.
    """
    histories = Histories(folder)
    verdict = judge(folder)
    facts: dict[str, Any] = {
        "verdict": VERDICTS[verdict.status],
        "plan": histories.plan,
        "figures": figures(histories),
        "invariants": _counts(verdict),
        "shortcomings": verdict.shortcomings,
        "violations": [
            {"invariant": v.invariant, "fact": v.fact, "task": v.task} for v in verdict.violations
        ],
        "timelines": verdict.timelines,
    }
    (folder / "report.json").write_text(json.dumps(facts, indent=2) + "\n")
    text = "\n".join(_as_markdown(facts)) + "\n"
    (folder / "report.md").write_text(text)
    return verdict, text


def _counts(verdict: Verdict) -> dict[str, int]:
    found = Counter(v.invariant for v in verdict.violations)
    return {invariant: found[invariant] for invariant in INVARIANTS}


def _as_markdown(facts: dict[str, Any]) -> list[str]:
    plan, counted = facts["plan"], facts["figures"]
    lines = [
        f"# AsyncFlow {plan['version']}: {facts['verdict']}",
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
    lines += ["| fault | times | bit | recovery p50 | p99 |", "|---|---:|---:|---:|---:|"]
    for kind, found in counted["faults"].items():
        p50, p99 = found.get("p50_seconds", ""), found.get("p99_seconds", "")
        lines.append(f"| {kind} | {found['times']} | {found['bit']} | {p50} | {p99} |")
    untried = sorted({*plan["all_kinds"]} - {*counted["faults"]})
    if untried:
        lines += ["", f"Not tried: {', '.join(untried)}."]
    for violation in facts["violations"][:SHOWN_MAX]:
        place = f" (task {violation['task']})" if violation["task"] else ""
        lines += ["", f"**{violation['invariant']}**: {violation['fact']}{place}"]
    for task, story in facts["timelines"].items():
        lines += ["", f"Task {task}:", "", "```text", *story, "```"]
    return lines


def _setting(plan: Line, counted: Line) -> str:
    mutant = f", mutant `{plan['mutant']}`" if plan["mutant"] else ""
    return (
        f"Seed {plan['seed']}, engine {plan['engine']}{mutant}, {plan['seconds']:g} s of faults, "
        f"Python {plan['python']}, {plan['cores']} cores ({counted['idle_share']} idle), "
        f"lease {plan['lease_seconds']:g} s."
    )


def _summary(counted: Line) -> str:
    return (
        f"{counted['accepted']} tasks accepted, **{counted['lost']} lost**; "
        f"{counted['unknown']} submissions of unknown outcome, {counted['recovered']} of them "
        f"stored; {counted['executions']} executions, {counted['duplicates']} of them in vain; "
        f"{counted['fenced']} attempts fenced; {counted['workers_lost']} workers given up, "
        f"{counted['leases_reaped']} leases reaped."
    )
