"""
Holds the histories of a run against each other, and says whether every promise was kept.

    python checker.py FOLDER

It reads files and nothing else, and imports nothing of the system it judges. What it knows of
that system is what is promised: the table of transitions, and one rule per invariant below.

Exit status: 0 every invariant holds, 1 one is violated, 3 the run proves nothing.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

PASSED, VIOLATED, INVALID = 0, 1, 3
VERDICTS = {PASSED: "passed", VIOLATED: "violated", INVALID: "invalid"}

Line = dict[str, Any]

INVARIANTS = {
    "I1": "Every accepted task exists and ends; what was refused does not exist.",
    "I2": "States change as the table says, without a gap; a terminal state is left by a redrive.",
    "I3": "One lease at a time: fresh, taken by a live worker, ended under its own name.",
    "I4": "Every execution has a lease, and stops when its worker cannot keep it.",
    "I5": "Nothing starts early, after its expiry, or after its cancellation.",
    "I6": "Attempts are counted, failures are charged, and both are bounded.",
    "I7": "A recorded result is right, and was made under the lease that recorded it.",
    "I13": "At the end nothing is left: no live task, no message, no process that will not stop.",
    "I14": "What one client reads of a task never goes backwards.",
    "I15": "A settlement that a log reports is in the database.",
}

TABLE = {
    ("pending", "queued"), ("pending", "running"), ("pending", "cancelled"),
    ("queued", "pending"), ("queued", "running"), ("queued", "cancelled"),
    ("running", "completed"), ("running", "failed"), ("running", "pending"),
    ("running", "cancelled"), ("failed", "pending"), ("cancelled", "pending"),
}  # fmt: skip
TERMINAL = {"completed", "failed", "cancelled"}
SETTLED_AS = {
    "complete": {"completed"},
    "fail": {"failed"},
    "retry": {"pending", "cancelled"},
    "release": {"pending", "cancelled"},
    "cancel": {"cancelled"},
}
CHARGES = {("running", "pending"): {0, 1}, ("running", "failed"): {1}}
RELEASES_MAX = 25
CLOCK_SLACK_US = 50_000
FENCE_SLACK_US = 1_000_000
EXAMPLES_MAX = 5


class Task:
    """
    Everything known of one task, in order.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self.lines: list[Line] = []
        self.logs: list[Line] = []
        self.submission: Line | None = None

    def seen(self, *kinds: str) -> list[Line]:
        """
        The lines of these kinds, such as `start` or `cancel.` for all that begin so.
        """
        return [line for line in self.lines if line["what"].startswith(kinds)]

    @cached_property
    def row(self) -> Line | None:
        """
        What the database has of it at the end.
        """
        return next(iter(self.seen("db.row")), None)

    @cached_property
    def history(self) -> list[Line]:
        """
        How the database remembers its life, from its submission on.
        """
        return sorted(self.seen("db.submit", "db.move"), key=lambda line: int(line["seq"]))

    @cached_property
    def moves(self) -> list[Line]:
        """
        Its transitions.
        """
        return [line for line in self.history if line["what"] == "db.move"]

    @cached_property
    def claims(self) -> dict[str, Line]:
        """
        The transitions to running, by lease.
        """
        return {m["lease"]: m for m in self.moves if m["new"] == "running" != m["old"]}

    @property
    def recipe(self) -> str:
        """
        What kind of task its client meant it to be.
        """
        return str(self.submission["recipe"]) if self.submission else "?"


@dataclass
class Violation:
    """
    A broken promise, and the task it was broken for.
    """

    invariant: str
    fact: str
    task: str | None


class Histories:
    """
    All lines of a run, by kind and by task; `us` is the monotonic clock in microseconds.
    """

    def __init__(self, folder: Path) -> None:
        self.plan: Line = json.loads((folder / "plan.json").read_text())
        lines = list(_lines(folder / "history"))
        clocks = [line["wall_us"] - line["t"] // 1000 for line in lines if line["what"] == "clock"]
        offset = int(median(clocks or [0]))
        for line in lines:
            line["us"] = line["t"] // 1000 if "t" in line else line.get("at", 0) - offset
        self.kinds: dict[str, list[Line]] = defaultdict(list)
        self.tasks: dict[str, Task] = {}
        for line in sorted(lines, key=lambda line: int(line["us"])):
            self.kinds[line["what"]].append(line)
            if "task" in line:
                self.task(line["task"]).lines.append(line)
        for line in _logs(folder / "logs"):
            if line["task_id"] in self.tasks:
                self.tasks[line["task_id"]].logs.append(line)
        self.invokes = {line["n"]: line for line in self.kinds["submit.invoke"]}
        answers = ("submit.ok", "submit.fail", "submit.info")
        self.answers = {line["n"]: line for kind in answers for line in self.kinds[kind]}
        for line in self.kinds["db.row"] + self.kinds["submit.ok"]:
            number = line["submission"] if line["what"] == "db.row" else line["n"]
            self.task(line["task"]).submission = self.invokes.get(number)
        self.workers: dict[str, list[Line]] = defaultdict(list)
        for kind in ("db.heartbeat", "db.lost", "db.stopped"):
            for line in self.kinds[kind]:
                self.workers[line["worker"]].append(line)
        self.faults = sorted(
            self.kinds["fault.start"] + self.kinds["fault.end"], key=lambda line: int(line["us"])
        )
        self.origin = min((line["us"] for line in lines if "t" in line), default=0)

    def task(self, id: str) -> Task:
        """
        The task of this id, known or new.
        """
        if id not in self.tasks:
            self.tasks[id] = Task(id)
        return self.tasks[id]

    def frozen(self) -> list[tuple[int, int, int]]:
        """
        (pid, from, to) of every time a process was made to stand still.
        """
        spans = []
        begun: dict[tuple[str, int], int] = {}
        for line in self.faults:
            if not line["kind"].startswith("pause"):
                continue
            key = (line["kind"], line["pid"])
            if line["what"] == "fault.start":
                begun[key] = line["us"]
            elif key in begun:
                spans.append((line["pid"], begun.pop(key), line["us"]))
        return spans


def _lines(folder: Path) -> Iterator[Line]:
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text().splitlines():
            yield json.loads(text)


def _logs(folder: Path) -> Iterator[Line]:
    for file in sorted(folder.glob("*.log")):
        for text in file.read_text(errors="replace").splitlines():
            # The last line of a killed process may be torn.
            with contextlib.suppress(ValueError):
                if '"task_id"' in text:
                    yield {**json.loads(text), "who": file.stem}


class Checker:
    """
    One verdict. Each `_check…` method is one invariant, or part of one.
    """

    def __init__(self, histories: Histories) -> None:
        self.h = histories
        self.violations: list[Violation] = []
        self.lease_us = int(histories.plan["lease_seconds"] * 1e6)
        self.frozen = histories.frozen()
        self.gone: dict[str, int] = {}
        self.beats: dict[str, list[int]] = defaultdict(list)

    def run(self) -> list[Violation]:
        """
        Every violation, worst first.
        """
        self._check_workers()
        for task in self.h.tasks.values():
            self._check_chain(task)
            self._check_leases(task)
            self._check_times(task)
            self._check_counts(task)
            self._check_result(task)
            self._check_executions(task)
            self._check_reads(task)
            self._check_logs(task)
        self._check_submissions()
        self._check_end()
        self.violations.sort(key=lambda v: int(v.invariant[1:]))
        return self.violations

    def _say(self, invariant: str, fact: str, task: Task | None = None) -> None:
        self.violations.append(Violation(invariant, fact, task.id if task else None))

    def _check_submissions(self) -> None:
        rows: dict[int, list[Task]] = defaultdict(list)
        for task in self.h.tasks.values():
            if task.row is not None:
                rows[task.row["submission"] or -1].append(task)
        for number, tasks in rows.items():
            if number not in self.h.invokes:
                self._say("I1", f"submission {number} was never made and is stored", tasks[0])
            elif len(tasks) > 1:
                self._say("I1", f"submission {number} is stored {len(tasks)} times", tasks[1])
        for number, answer in self.h.answers.items():
            stored = rows.get(number, [])
            if answer["what"] == "submit.ok":
                task = self.h.task(answer["task"])
                if task.row is None:
                    self._say("I1", f"submission {number} was answered 202 and is lost", task)
                elif task not in stored:
                    self._say("I1", f"submission {number} is stored as another task", task)
            elif answer["what"] == "submit.fail" and stored:
                self._say("I1", f"submission {number} was refused and is stored", stored[0])
        for task in self.h.tasks.values():
            if task.row is not None and task.row["state"] not in TERMINAL:
                self._say("I1", f"it is still {task.row['state']} at the end", task)

    def _check_chain(self, task: Task) -> None:
        state: str | None = None
        generation = 1
        redrives = len(task.seen("redrive.invoke"))
        for move in task.history:
            if move["what"] == "db.submit":
                if state is not None:
                    self._say("I2", "it was stored a second time", task)
                state = move["new"]
                continue
            if move["old"] != state:
                self._say("I2", f"it was {state}, then left {move['old']}", task)
            old, state = move["old"], move["new"]
            if old != state and (old, state) not in TABLE:
                self._say("I2", f"{old} → {state} is no transition", task)
            if old == state and move["old_lease"] != move["lease"]:
                self._say("I2", f"its lease changed while it was {state}", task)
            if (old in TERMINAL) != (move["generation"] == generation + 1):
                self._say("I2", f"{old} → {state} in generation {move['generation']}", task)
            generation = move["generation"]
        if generation > 1 + redrives:
            self._say("I2", f"generation {generation} after {redrives} redrives", task)
        if task.row is not None and task.row["state"] != state:
            self._say("I2", f"it is {task.row['state']}, its last transition says {state}", task)

    def _check_workers(self) -> None:
        for worker, lines in self.h.workers.items():
            for line in sorted(lines, key=lambda each: int(each["seq"])):
                if line["what"] == "db.heartbeat":
                    self.beats[worker].append(line["us"])
                    if worker in self.gone:
                        self._say("I3", f"worker {worker} beat on after it was gone")
                elif worker not in self.gone:
                    self.gone[worker] = line["seq"]
                    overdue = min(line["lease_seconds"], 2 * line["heartbeat_seconds"] + 0.5)
                    silent = (line["silent_micros"] or 0) / 1e6
                    if line["what"] == "db.lost" and silent < overdue - 0.1:
                        self._say(
                            "I3", f"worker {worker} was given up after {silent:.2f} s of silence"
                        )

    def _check_leases(self, task: Task) -> None:
        seen = set()
        for move in task.moves:
            if move["new"] == "running" and move["old"] != "running":
                lease = move["lease"]
                if lease is None or lease in seen:
                    self._say("I3", f"lease {lease} was given twice", task)
                seen.add(lease)
            if move["old"] == "running" and move["kind"] == "WorkerLost":
                gone = self.gone.get(move["old_worker"])
                if move["new"] in ("failed", "pending") and (gone is None or gone > move["seq"]):
                    self._say("I3", "it was taken from a worker that was not gone", task)

    def _check_executions(self, task: Task) -> None:
        starts, ends = task.seen("start"), task.seen("end")
        for start in starts:
            claim = task.claims.get(start["lease"])
            if claim is None:
                self._say("I4", f"it ran under lease {start['lease']}, which nobody gave", task)
            elif start["attempt"] != claim["attempt"]:
                self._say("I4", f"attempt {claim['attempt']} ran as {start['attempt']}", task)
            elif start["us"] < claim["us"] - CLOCK_SLACK_US:
                self._say("I4", "it ran before it was claimed", task)
        for lease, times in Counter(start["lease"] for start in starts).items():
            if times > 1:
                self._say("I4", f"lease {lease} ran {times} times", task)
        returned = {end["lease"]: end["us"] for end in ends if end["how"] == "returned"}
        for move in task.moves:
            if move["old"] == "running" and move["new"] == "completed":
                at = returned.get(move["old_lease"])
                if at is None or at > move["us"] + CLOCK_SLACK_US:
                    self._say("I4", "it completed and its handler had not returned", task)
        for end in ends:
            self._check_fence(task, end)

    def _check_fence(self, task: Task, end: Line) -> None:
        """
        A handler in the loop can be stopped at once, so it must not go on when the worker has
        not been able to beat for a whole lease; unless the process stood still.
        """
        if end["isolation"] != "loop":
            return
        claim = task.claims.get(end["lease"], {"worker": None})
        beats = self.beats[claim["worker"]]
        before = beats[: bisect_right(beats, end["us"])]
        if not before:
            return
        silent = end["us"] - before[-1]
        for pid, begin, until in self.frozen:
            if pid == end["pid"]:
                # It may need a moment to notice.
                if begin <= end["us"] <= until + FENCE_SLACK_US:
                    return
                silent -= max(0, min(until, end["us"]) - max(begin, before[-1]))
        if silent > self.lease_us + FENCE_SLACK_US:
            seconds = silent / 1e6
            self._say("I4", f"it went on {seconds:.1f} s after its worker's last heartbeat", task)

    def _check_times(self, task: Task) -> None:
        for move in task.moves:
            if move["new"] != "running" or move["old"] == "running":
                continue
            if move["now"] < move["old_run_at"]:
                early = (move["old_run_at"] - move["now"]) / 1e6
                self._say("I5", f"it was claimed {early:.3f} s before its time", task)
            if move["expires_at"] and move["now"] > move["expires_at"]:
                self._say("I5", "it was claimed after it had expired", task)
            if move["cancel_requested"]:
                self._say("I5", "it was claimed after its cancellation was asked for", task)

    def _check_counts(self, task: Task) -> None:
        releases = 0
        for move in task.moves:
            old, new = move["old"], move["new"]
            is_claim = new == "running" and old != "running"
            if move["attempt"] != move["old_attempt"] + is_claim:
                self._say("I6", f"attempt {move['old_attempt']} → {move['attempt']}", task)
            charged = move["failures"] - move["old_failures"]
            if old in TERMINAL:
                if move["failures"]:
                    self._say("I6", "a redrive kept its failures", task)
            elif charged not in CHARGES.get((old, new), {0}):
                self._say("I6", f"{old} → {new} charged {charged} failures", task)
            limit = move["max_attempts"]
            if limit is not None and old == "running":
                if new == "pending" and move["failures"] >= limit:
                    self._say("I6", f"another attempt after {limit} failures", task)
                if new == "failed" and move["failures"] != limit:
                    self._say("I6", f"failed after {move['failures']} of {limit} failures", task)
            if old == "running" and new == "pending":
                releases += not charged
                self._check_backoff(task, move, charged)
        if releases > RELEASES_MAX:
            self._say("I6", f"{releases} attempts were charged to nobody", task)

    def _check_backoff(self, task: Task, move: Line, charged: int) -> None:
        if not charged or move["kind"] in ("WorkerLost", "Crashed"):
            return  # After a crash the first retry is due at once.
        base, cap = self.h.plan["backoff"]
        least = min(cap, base * 2 ** (move["failures"] - 1))
        wait = (move["run_at"] - move["now"]) / 1e6
        if wait < 0.95 * least:
            self._say("I6", f"due again after {wait:.3f} s instead of {least:g} s", task)

    def _check_result(self, task: Task) -> None:
        for move in task.moves:
            if move["old"] != "running":
                continue
            if move["new"] == "completed" and move["result_lease"] != move["old_lease"]:
                self._say(
                    "I7",
                    f"lease {move['old_lease']} recorded a result of {move['result_lease']}",
                    task,
                )
            named = re.search(r"lease=([0-9a-f-]{36})", move["message"] or "")
            if named and move["new"] != "completed" and named[1] != move["old_lease"]:
                self._say(
                    "I7", f"lease {move['old_lease']} recorded the failure of {named[1]}", task
                )
        row, submission = task.row, task.submission
        if row is None or submission is None:
            return
        if row["state"] != "completed":
            if row["has_result"]:
                self._say("I7", f"it is {row['state']} and has a result", task)
            return
        payload = submission["body"]["payload"]
        if row["result_digest"] != submission["digest"]:
            self._say("I7", "its result is not that of its payload", task)
        if row["result_submission"] != submission["n"]:
            self._say("I7", f"its result is that of submission {row['result_submission']}", task)
        if row["result_attempt"] != row["attempt"] or row["result_lease"] != row["lease"]:
            self._say("I7", "its result is not that of its last attempt", task)
        if task.recipe == "big" and row["result_blob"] != 200_000:
            self._say("I7", f"its result was cut to {row['result_blob']}", task)
        if row["attempt"] <= payload.get("times", 0) or task.recipe in ("doom", "exit", "stubborn"):
            self._say("I7", f"a task that must fail ({task.recipe}) completed", task)

    def _check_end(self) -> None:
        for drained in self.h.kinds["drained"]:
            for queue in drained["queues"]:
                if queue["messages"]:
                    self._say("I13", f"{queue['messages']} messages are left in {queue['name']}")
        for line in self.h.kinds["process.ended"]:
            if line["final"] and line["status"] != 0:
                self._say("I13", f"{line['who']} was asked to stop and ended with {line['status']}")
        for fault in self.h.faults:
            if fault["kind"] == "terminate" and fault["what"] == "fault.end":
                if fault["evidence"] and not fault["detail"].endswith("with 0"):
                    self._say("I13", f"{fault['target']} on SIGTERM: {fault['detail']}")

    def _check_reads(self, task: Task) -> None:
        latest: tuple[int, int, int] = (0, 0, 0)
        for read in task.seen("read"):
            if read["status"] == 404:
                self._say("I14", "it was accepted and then not found", task)
                continue
            state = read["state"].lower()
            rank = 0 if state == "running" else 2 if state in TERMINAL else 1
            now = (read["generation"], read["attempt"], rank)
            if now < latest:
                self._say("I14", f"a client read {latest} and later {now}", task)
            latest = max(latest, now)

    def _check_logs(self, task: Task) -> None:
        left = {(m["old_attempt"], m["new"]) for m in task.moves if m["old"] == "running"}
        for line in task.logs:
            if line.get("event") == "attempt.settled":
                may_be = {(line["attempt"], new) for new in SETTLED_AS[line["outcome"]]}
                if not may_be & left:
                    self._say(
                        "I15",
                        f"{line['who']} reports attempt {line['attempt']} as {line['outcome']}, "
                        "the database does not",
                        task,
                    )


def shortcomings(h: Histories) -> list[str]:
    """
    Why this run proves nothing; empty if it proves something.
    """
    bit = {fault["kind"] for fault in h.kinds["fault.end"] if fault["evidence"]}
    ended = {phase["phase"] for phase in h.kinds["phase"]} >= {"stopping"} and h.kinds["drained"]
    facts = {
        **{f"fault {kind} never bit": kind not in bit for kind in h.plan["kinds"]},
        "no task was accepted": not h.kinds["submit.ok"],
        "the database recorded nothing": not h.kinds["db.submit"],
        "no task completed": not any(m["new"] == "completed" for m in h.kinds["db.move"]),
        "no zombie was fenced": "pause" in h.plan["kinds"] and not fenced(h),
        "the run did not come to its end": not ended,
    }
    return [reason for reason, is_so in facts.items() if is_so]


def fenced(h: Histories) -> int:
    """
    How many attempts ended without their lease: what they came to was not recorded.
    """
    return sum(
        line.get("event") == "attempt.void" for task in h.tasks.values() for line in task.logs
    )


def timeline(h: Histories, id: str) -> list[str]:
    """
    Everything that was seen of one task, by all, in one order; a line each.
    """
    task = h.task(id)
    told: list[tuple[int, str, str]] = []
    if task.submission is not None:
        told.append((task.submission["us"], "client", f"submits a {task.recipe} task"))
    for line in task.seen("submit.ok", "cancel.", "redrive."):
        fact = line["what"].replace(".", " ") + (f" {line['state']}" if line.get("state") else "")
        told.append((line["us"], "client", fact))
    for line in task.seen("read"):
        told.append((line["us"], "client", f"reads {line['state']} attempt {line['attempt']}"))
    for line in task.history:
        told.append((line["us"], "database", _move_in_words(line)))
    for line in task.seen("start", "end"):
        how = line.get("how", "starts")
        told.append((line["us"], f"handler {line['pid']}", f"{how}, lease {_short(line['lease'])}"))
    if told:
        first, last = min(told)[0], max(told)[0]
        for line in h.faults:
            if first - 5e6 < line["us"] < last + 1e6:
                fact = f"{line['kind']} {line['target']}: {line.get('detail', 'begins')}"
                told.append((line["us"], "nemesis", fact))
        for worker in {m["worker"] for m in task.moves} - {None}:
            for line in h.workers[worker]:
                if line["what"] != "db.heartbeat":
                    word = line["what"].removeprefix("db.")
                    told.append((line["us"], "database", f"worker {_short(worker)} {word}"))
    return [f"{(at - h.origin) / 1e6:10.3f} s  {who:<16} {fact}" for at, who, fact in sorted(told)]


def _move_in_words(line: Line) -> str:
    if line["what"] == "db.submit":
        return "stored as pending"
    words = f"{line['old']} → {line['new']}, attempt {line['attempt']}"
    words += f", {line['failures']} failures, generation {line['generation']}"
    if line["lease"]:
        words += f", lease {_short(line['lease'])} of worker {_short(line['worker'])}"
    if line["new"] == "completed":
        words += f", result of lease {_short(line['result_lease'])}"
    return words + (f", {line['kind']}" if line["kind"] else "")


def _short(id: str | None) -> str:
    return id[:8] if id else "none"


@dataclass
class Verdict:
    """
    What the checker has to say. `status` is its exit status.
    """

    status: int
    violations: list[Violation]
    shortcomings: list[str]
    timelines: dict[str, list[str]]


def judge(folder: Path) -> Verdict:
    """
    Read a run's folder and judge it.
    """
    histories = Histories(folder)
    violations = Checker(histories).run()
    reasons = shortcomings(histories)
    status = VIOLATED if violations else INVALID if reasons else PASSED
    firsts = {v.invariant: v.task for v in reversed(violations) if v.task}
    examples = [*dict.fromkeys(firsts[i] for i in INVARIANTS if i in firsts)][:EXAMPLES_MAX]
    return Verdict(status, violations, reasons, {id: timeline(histories, id) for id in examples})


def main() -> int:
    """
    Print the verdict on the folder that the first argument names.
    """
    verdict = judge(Path(sys.argv[1]))
    told = [f"{v.invariant} {v.fact} {v.task or ''}" for v in verdict.violations]
    for task, lines in verdict.timelines.items():
        told += ["", f"Task {task}", *lines]
    sys.stdout.write("\n".join([*told, *verdict.shortcomings, VERDICTS[verdict.status], ""]))
    return verdict.status


if __name__ == "__main__":
    sys.exit(main())
