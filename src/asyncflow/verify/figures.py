"""
What a run counted and how long it took to recover, for people. The verdict is `checker`'s.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from statistics import median, quantiles

from asyncflow.verify.checker import Histories, Line, Task, fenced

RECOVERY_SECONDS_MAX = 30.0


def figures(h: Histories) -> Line:
    """
    The counts and times of a run.
    """
    answers = Counter(answer["what"] for answer in h.answers.values())
    stored = {t.row["submission"] for t in h.tasks.values() if t.row}
    unknown = [n for n, a in h.answers.items() if a["what"] == "submit.info"]
    accepted = [n for n, a in h.answers.items() if a["what"] == "submit.ok"]
    idle = [line["idle"] for line in h.kinds["cpu"]]
    return {
        "submitted": len(h.invokes),
        "accepted": len(accepted),
        "refused": answers["submit.fail"],
        "unknown": len(unknown),
        "recovered": sum(n in stored for n in unknown),
        "lost": sum(n not in stored for n in accepted),
        "states": dict(Counter(t.row["state"] for t in h.tasks.values() if t.row)),
        "executions": len(h.kinds["start"]),
        "duplicates": sum(_duplicates(task) for task in h.tasks.values()),
        "fenced": fenced(h),
        "workers_lost": sum(
            any(line["what"] == "db.lost" for line in lines) for lines in h.workers.values()
        ),
        "leases_reaped": sum(
            m["kind"] == "WorkerLost" and m["old"] == "running"
            for task in h.tasks.values()
            for m in task.moves
        ),
        "idle_share": round(median(idle), 2) if idle else None,
        "faults": _fault_figures(h),
    }


def _duplicates(task: Task) -> int:
    """
    How many of its executions came to nothing, because their lease was lost or given back.
    """
    started = {start["lease"] for start in task.seen("start")}
    return sum(
        move["old_lease"] in started
        for move in task.moves
        if move["old"] == "running"
        and move["new"] == "pending"
        and (move["kind"] == "WorkerLost" or move["failures"] == move["old_failures"])
    )


def _fault_figures(h: Histories) -> dict[str, Line]:
    """
    Per kind: how often, how often it bit, and how long after its end tasks completed again; for
    those that end a worker's leases, how long after its beginning its tasks were claimed anew.
    """
    completions = sorted(m["us"] for m in h.kinds["db.move"] if m["new"] == "completed")
    kinds: dict[str, Line] = {}
    begun: dict[tuple[str, str], int] = {}
    recovery: dict[str, list[float]] = defaultdict(list)
    for line in h.faults:
        kind, key = line["kind"], (line["kind"], line["target"])
        if line["what"] == "fault.start":
            begun[key] = line["us"]
            continue
        found = kinds.setdefault(kind, {"times": 0, "bit": 0})
        found["times"] += 1
        found["bit"] += bool(line["evidence"])
        if kind in ("kill-worker", "pause"):
            recovery[kind] += _reruns(h, begun[key], line["us"])
        else:
            next_one = completions[bisect_right(completions, line["us"]) :][:1]
            recovery[kind] += [(at - line["us"]) / 1e6 for at in next_one]
    for kind, seconds in recovery.items():
        if len(seconds) > 1:
            cuts = quantiles(seconds, n=100, method="inclusive")
            kinds[kind] |= {"p50_seconds": round(cuts[49], 2), "p99_seconds": round(cuts[98], 2)}
        elif seconds:
            kinds[kind] |= {"p50_seconds": round(seconds[0], 2)}
    return dict(sorted(kinds.items()))


def _reruns(h: Histories, begin: int, end: int) -> list[float]:
    seconds = []
    for task in h.tasks.values():
        moves = task.moves
        for reaped, after in itertools.pairwise(moves):
            taken = reaped["kind"] == "WorkerLost" and reaped["old"] == "running"
            if taken and begin < reaped["us"] < end + RECOVERY_SECONDS_MAX * 1e6:
                claim = next(
                    (m for m in moves[moves.index(after) :] if m["new"] == "running"), None
                )
                if claim is not None:
                    seconds.append((claim["us"] - begin) / 1e6)
    return seconds
