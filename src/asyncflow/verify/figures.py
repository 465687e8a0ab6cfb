"""
Counts and recovery times of a run, for people. The verdict is that of `checker`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from asyncflow.verify.checker import Histories, Line, TaskHistory

STRIKES = ("kill", "kill-worker", "pause", "cut-off", "hold-postgres")
"""Faults that can cost a worker its leases."""

OUTAGES = ("postgres-crash", "terminate-backends")
OUTAGE_US_AFTERWARDS = 2_000_000
"""How long after PostgreSQL is up again processes may still be reconnecting."""

LAST_BEAT_US_MAX = 500_000
"""How long after a strike a heartbeat that was in flight may arrive."""


@dataclass(frozen=True, slots=True)
class Span:
    """
    A fault from beginning to end.
    """

    kind: str
    pid: int | None
    begin: int
    end: int


class Figures:
    """
    Counts while the checker goes through the tasks.
    """

    def __init__(self, histories: Histories) -> None:
        self._h = histories
        self._states: Counter[str] = Counter()
        self._lost = 0
        self._stored_unknown = 0
        self._duplicates = 0
        self._reaped = 0
        self._completions = array("q")
        self._reruns: dict[tuple[str, bool], list[tuple[float, float]]] = defaultdict(list)
        self._spans = [
            Span(f["kind"], f["pid"], f["us"] - int(f["seconds"] * 1e6), f["us"])
            for f in histories.kinds["fault.end"]
        ]
        self._outages = [
            (span.begin, span.end + OUTAGE_US_AFTERWARDS)
            for span in self._spans
            if span.kind in OUTAGES
        ]
        self._strikes = {
            worker: strike
            for worker, lines in histories.workers.items()
            if (strike := self._strike(lines)) is not None
        }

    def look(self, task: TaskHistory) -> None:
        """
        Include a task.
        """
        self._count(task)
        started = {start["lease"] for start in task.seen("start")}
        for number, move in enumerate(task.moves):
            if move["new"] == "completed":
                self._completions.append(move["us"])
            if move["old"] != "running" or move["new"] == "running":
                continue
            is_reaped = move["kind"] == "WorkerLost"
            self._reaped += is_reaped
            if move["new"] == "pending" and move["old_lease"] in started:
                # Its execution was wasted: the lease was lost or released.
                self._duplicates += is_reaped or move["failures"] == move["old_failures"]
            if is_reaped:
                self._note_rerun(move, task.moves[number + 1 :])

    def _count(self, task: TaskHistory) -> None:
        if task.row is None:
            self._lost += bool(task.seen("submit.ok"))
            return
        self._states[task.row["state"]] += 1
        unanswered = self._h.unanswered.get(task.row["submission"] or -1)
        self._stored_unknown += unanswered is not None and unanswered["what"] == "submit.info"

    def _strike(self, lines: Sequence[Line]) -> Span | None:
        """
        The fault that ended a worker: the last one on its process without a heartbeat afterwards.
        """
        beats = [line["us"] for line in lines if line["what"] == "db.heartbeat"]
        lost = [line["us"] for line in lines if line["what"] == "db.lost"]
        if not beats or not lost:
            return None
        pid = int(lines[0]["name"].rpartition(":")[2])
        strikes = [
            span
            for span in self._spans
            if span.kind in STRIKES and span.pid == pid and span.begin < lost[0]
        ]
        last = max(strikes, key=lambda span: span.begin, default=None)
        return last if last and beats[-1] < last.begin + LAST_BEAT_US_MAX else None

    def _note_rerun(self, reaped: Line, later: Sequence[Line]) -> None:
        strike = self._strikes.get(reaped["old_worker"])
        claim = next((move for move in later if move["new"] == "running"), None)
        # A task that has failed before waits for its backoff.
        is_due_now = reaped["run_at"] <= reaped["now"]
        if strike is None or claim is None or not is_due_now:
            return
        in_outage = any(begin < claim["us"] and strike.begin < end for begin, end in self._outages)
        freed, begun = ((move["us"] - strike.begin) / 1e6 for move in (reaped, claim))
        self._reruns[strike.kind, in_outage].append((freed, begun))

    def result(self, *, fenced: int) -> Line:
        """
        The counts and times of the run, once every task has been included.

        Args:
            fenced: The checker's count of fenced attempts.
        """
        h = self._h
        idle = [line["idle"] for line in h.kinds["cpu"]]
        moves = h.counts["db.submit"] + h.counts["db.move"]
        return {
            "submitted": h.counts["submit.invoke"],
            "accepted": h.counts["submit.ok"],
            "refused": h.counts["submit.fail"],
            "unknown": h.counts["submit.info"],
            "recovered": self._stored_unknown,
            "lost": self._lost,
            "states": dict(self._states),
            "transitions": moves,
            "executions": h.counts["start"],
            "duplicates": self._duplicates,
            "fenced": fenced,
            "workers_lost": sum(
                any(line["what"] == "db.lost" for line in lines) for lines in h.workers.values()
            ),
            "leases_reaped": self._reaped,
            "accepted_per_second": self._accepted_per_second(),
            "idle_share": round(median(idle), 2) if idle else None,
            "faults": self._faults(),
            "reruns": [
                {
                    "kind": kind,
                    "in_outage": in_outage,
                    "tasks": len(waits),
                    "freed": _spread([freed for freed, _ in waits]),
                    "begun": _spread([begun for _, begun in waits]),
                }
                for (kind, in_outage), waits in sorted(self._reruns.items())
            ],
            "drain_seconds": self._seconds_between("healed", "stopping"),
        }

    def _accepted_per_second(self) -> float | None:
        seconds = self._seconds_between("calm", "healed")
        return round(self._h.counts["submit.ok"] / seconds, 1) if seconds else None

    def _seconds_between(self, one: str, other: str) -> float | None:
        phases = {line["phase"]: int(line["us"]) for line in self._h.kinds["phase"]}
        if not {one, other} <= phases.keys():
            return None
        return round((phases[other] - phases[one]) / 1e6, 1)

    def _faults(self) -> dict[str, Line]:
        """
        Per kind: how often, how often with effect, and the time from its end to a completion.
        """
        completions = sorted(self._completions)
        kinds: dict[str, Line] = {}
        waits: dict[str, list[float]] = defaultdict(list)
        for line in self._h.kinds["fault.end"]:
            found = kinds.setdefault(line["kind"], {"times": 0, "bit": 0})
            found["times"] += 1
            found["bit"] += bool(line["evidence"])
            following = bisect_right(completions, line["us"])
            for at in completions[following : following + 1]:
                waits[line["kind"]].append((at - line["us"]) / 1e6)
        return {kind: found | _spread(waits[kind]) for kind, found in sorted(kinds.items())}


def _spread(seconds: Sequence[float]) -> Line:
    """
    The median, the 99th percentile and the maximum; empty for no values.
    """
    if not seconds:
        return {}
    ranked = sorted(seconds)
    ranks = {"p50": len(ranked) // 2, "p99": len(ranked) * 99 // 100, "max": len(ranked) - 1}
    return {f"{name}_seconds": round(ranked[rank], 2) for name, rank in ranks.items()}
