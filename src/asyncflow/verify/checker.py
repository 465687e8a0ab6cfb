"""
Compares the histories of a run and decides whether every guarantee held.

    python checker.py FOLDER

It reads only files, and imports nothing of the system it judges. All it knows of that system is
what is guaranteed: the table of transitions, and one rule per invariant below.

A run may leave more lines than fit into memory. So they are first partitioned by task; then one
part after another is read and judged, task by task.

Exit status: 0 every invariant held, 1 one was violated, 3 the run proves nothing.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from array import array
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import SpooledTemporaryFile, TemporaryFile
from typing import Any

PASSED, VIOLATED, INVALID = 0, 1, 3
VERDICTS = {PASSED: "passed", VIOLATED: "violated", INVALID: "invalid"}

Line = dict[str, Any]

INVARIANTS = {
    "I1": "Every accepted task exists and ends; what was refused does not; a batch is all or none.",
    "I2": "States change as the table says, without a gap; a terminal state is left by a redrive.",
    "I3": "One lease at a time: fresh, taken by a live worker, ended under its own name.",
    "I4": "Every execution has a lease, and stops when its worker cannot keep it.",
    "I5": "Nothing starts early, expired or cancelled, and nothing is cancelled without a reason.",
    "I6": "Attempts are counted, failures are charged, and both are bounded.",
    "I7": "A recorded result is right, and was made under the lease that recorded it.",
    "I13": "Processes end when asked, and not before; nothing is left then, no task, no message.",
    "I14": "What one client reads of a task never goes backwards.",
    "I15": "A settlement that a log reports is in the database.",
    "I16": "RabbitMQ does not bring the same hints again and again.",
}

TABLE = {
    ("pending", "queued"), ("pending", "running"), ("pending", "cancelled"),
    ("queued", "pending"), ("queued", "running"), ("queued", "cancelled"),
    ("running", "completed"), ("running", "failed"), ("running", "pending"),
    ("running", "cancelled"), ("failed", "pending"), ("cancelled", "pending"),
}  # fmt: skip
TERMINAL = {"completed", "failed", "cancelled"}
SETTLED_AS = {
    "completed": {"completed"},
    "failed": {"failed"},
    "retried": {"pending", "cancelled"},
    "released": {"pending", "cancelled"},
    "cancelled": {"cancelled"},
}
CHARGES = {("running", "pending"): {0, 1}, ("running", "failed"): {1}}
RELEASES_MAX = 25
CLOCK_SLACK_US = 50_000
FENCE_SLACK_US = 1_000_000
REDELIVERIES_MAX = 0.5  # Per claim: a broken connection redelivers what it had not acknowledged.

PARTS = 128
PART_BYTES_IN_MEMORY = 65_536
WHAT = re.compile(rb'"what" ?: ?"([^"]*)"')
TASK = re.compile(rb'"task" ?: ?"([^"]*)"')
LOGGED = re.compile(rb'"event": "(attempt\.settled|attempt\.void)"')
LOGGED_TASK = re.compile(rb'"task_id": "([^"]*)"')


class TaskHistory:
    """
    Everything recorded about one task, in order.

    Attributes:
        row: Its row at the end; None if there is none.
        history: The database's record of it, from the submission on.
        moves: The transitions in that record.
        claims: The transitions to running, by lease.
        logs: What workers logged about it.
        submission: Its client's record of the submission; None if no client made it.
        recipe: The kind of task.
    """

    def __init__(self, id: str, lines: list[Line]) -> None:
        self.id = id
        self.logs = [line for line in lines if "event" in line]
        self.lines = [line for line in lines if "event" not in line]
        self.lines.sort(key=lambda line: int(line["us"]))
        self._kinds: dict[str, list[Line]] = {}
        for line in self.lines:
            self._kinds.setdefault(line["what"], []).append(line)
        self.row: Line | None = next(iter(self.seen("db.row")), None)
        self.moves = sorted(self.seen("db.move"), key=lambda move: int(move["seq"]))
        self.history = sorted(self.seen("db.submit") + self.moves, key=lambda m: int(m["seq"]))
        self.claims = {m["lease"]: m for m in self.moves if m["new"] == "running" != m["old"]}
        self.submission: Line | None = None
        self.recipe = "?"

    def seen(self, kind: str) -> list[Line]:
        """
        The lines of one kind.
        """
        return self._kinds.get(kind, [])


@dataclass
class Violation:
    """
    A violated invariant, and the task concerned, if it is one.
    """

    invariant: str
    fact: str
    task: str | None


class Histories:
    """
    All lines of a run; `us` is the monotonic clock in microseconds.

    Attributes:
        kinds: Lines that are not about a single task, by kind.
        counts: The number of lines of each kind; log lines count by event.
        unanswered: The last line about each submission that yielded no task, by number.
    """

    def __init__(self, folder: Path) -> None:
        self.plan: Line = json.loads((folder / "plan.json").read_text())
        self.kinds: dict[str, list[Line]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.unanswered: dict[int, Line] = {}
        self._invokes = TemporaryFile()
        self._invoked_at = array("q")
        self._parts = [SpooledTemporaryFile(PART_BYTES_IN_MEMORY) for _ in range(PARTS)]
        for file in sorted((folder / "history").glob("*.jsonl")):
            self._sort_history(file)
        for file in sorted((folder / "logs").glob("*.log")):
            self._sort_log(file)
        clocks = [line["wall_us"] - line["t"] // 1000 for line in self.kinds["clock"]]
        self._offset = int(median(clocks or [0]))
        for lines in self.kinds.values():
            lines.sort(key=self._set_time)
        self.workers: dict[str, list[Line]] = defaultdict(list)
        for kind in ("db.heartbeat", "db.lost", "db.stopped"):
            for line in self.kinds[kind]:
                self.workers[line["worker"]].append(line)

    def _sort_history(self, file: Path) -> None:
        with file.open("rb") as lines:
            for raw in lines:
                found = WHAT.search(raw)
                if found is None or not raw.endswith(b"\n"):
                    continue  # Torn: the last line of a killed process.
                what = found[1].decode()
                self.counts[what] += 1
                if what == "submit.invoke":
                    self._keep_invoke(raw)
                elif about := TASK.search(raw):
                    self._part(about[1]).write(raw)
                else:
                    line = json.loads(raw)
                    self.kinds[what].append(line)
                    if what in ("submit.fail", "submit.info"):
                        self.unanswered[line["n"]] = line

    def _sort_log(self, file: Path) -> None:
        with file.open("rb") as lines:
            for raw in lines:
                event, about = LOGGED.search(raw), LOGGED_TASK.search(raw)
                if event and about:
                    self.counts[event[1].decode()] += 1
                    self._part(about[1]).write(file.stem.encode() + b"\t" + raw)

    def _part(self, task: bytes) -> SpooledTemporaryFile[bytes]:
        return self._parts[zlib.crc32(task) % PARTS]

    def _keep_invoke(self, raw: bytes) -> None:
        number = json.loads(raw)["n"]
        self._invoked_at.extend([-1] * (number + 1 - len(self._invoked_at)))
        self._invoked_at[number] = self._invokes.tell()
        self._invokes.write(raw)

    def invoke(self, number: int) -> Line | None:
        """
        The client's record of this submission; None if it was never made.
        """
        if not 0 <= number < len(self._invoked_at) or self._invoked_at[number] < 0:
            return None
        self._invokes.seek(self._invoked_at[number])
        line: Line = json.loads(self._invokes.readline())
        self._set_time(line)
        return line

    def tasks(self) -> Iterator[TaskHistory]:
        """
        Every recorded task once; to be called only once.
        """
        for part in self._parts:
            lines: dict[str, list[Line]] = {}
            part.seek(0)
            for raw in part:
                who, is_log, text = raw.rpartition(b"\t")
                try:
                    line = json.loads(text)
                except ValueError:
                    if is_log:
                        continue  # Torn, and the next process appended to it.
                    raise
                if is_log:
                    line["who"] = who.decode()
                else:
                    self._set_time(line)
                lines.setdefault(line["task_id" if is_log else "task"], []).append(line)
            part.close()
            for id, about in lines.items():
                yield self._with_submission(TaskHistory(id, about))
        self._invokes.close()

    def _with_submission(self, task: TaskHistory) -> TaskHistory:
        source = task.row or next(iter(task.seen("submit.ok")), {})
        number = source.get("submission", source.get("n"))
        task.submission = None if number is None else self.invoke(number)
        task.recipe = task.submission["recipe"] if task.submission else "?"
        return task

    def _set_time(self, line: Line) -> int:
        line["us"] = line["t"] // 1000 if "t" in line else line.get("at", 0) - self._offset
        return int(line["us"])


class Checker:
    """
    Judges one run. Each `_check…` method checks an invariant, or part of one.
    """

    def __init__(self, histories: Histories) -> None:
        self.h = histories
        self.violations: list[Violation] = []
        self.completed = self.fenced = self.claimed = 0
        self.lease_us = int(histories.plan["lease_seconds"] * 1e6)
        pauses = [f for f in histories.kinds["fault.end"] if f["kind"].startswith("pause")]
        self.frozen = [(f["pid"], f["us"] - int(f["seconds"] * 1e6), f["us"]) for f in pauses]
        self.gone: dict[str, int] = {}
        self.beats: dict[str, list[int]] = defaultdict(list)
        self.stored: set[int] = set()

    def run(self, look: Callable[[TaskHistory, list[Violation]], None]) -> list[Violation]:
        """
        Return every violation, worst first. `look` is called with each task and its violations.
        """
        self._check_workers()
        for task in self.h.tasks():
            before = len(self.violations)
            self._check_submission(task)
            self._check_chain(task)
            self._check_leases(task)
            self._check_times(task)
            self._check_cancellation(task)
            self._check_counts(task)
            self._check_result(task)
            self._check_executions(task)
            self._check_reads(task)
            self._check_logs(task)
            look(task, self.violations[before:])
        self._check_batches()
        self._check_end()
        self.violations.sort(key=lambda v: int(v.invariant[1:]))
        return self.violations

    def _say(self, invariant: str, fact: str, task: TaskHistory | None = None) -> None:
        self.violations.append(Violation(invariant, fact, task.id if task else None))

    def _check_submission(self, task: TaskHistory) -> None:
        for answer in task.seen("submit.ok"):
            if task.row is None:
                self._say("I1", f"submission {answer['n']} was answered 202 and is lost", task)
            elif task.row["submission"] != answer["n"]:
                self._say("I1", f"submission {answer['n']} is stored as another task", task)
        if task.row is None:
            return
        number = task.row["submission"] or -1
        if task.submission is None:
            self._say("I1", f"submission {number} was never made and is stored", task)
        elif number in self.stored:
            self._say("I1", f"submission {number} is stored a second time", task)
        elif self.h.unanswered.get(number, {"what": ""})["what"] == "submit.fail":
            self._say("I1", f"submission {number} was refused and is stored", task)
        self.stored.add(number)
        self.claimed += len(task.claims)
        self.completed += task.row["state"] == "completed"
        if task.row["state"] not in TERMINAL:
            self._say("I1", f"it is still {task.row['state']} at the end", task)

    def _check_batches(self) -> None:
        batches: dict[int, list[int]] = defaultdict(list)
        for number, line in self.h.unanswered.items():
            if "batch" in line:
                batches[line["batch"]].append(number)
        for batch, numbers in batches.items():
            count = sum(number in self.stored for number in numbers)
            if 0 < count < len(numbers):
                self._say("I1", f"{count} of the {len(numbers)} tasks of batch {batch} are stored")

    def _check_chain(self, task: TaskHistory) -> None:
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
                        self._say("I3", f"worker {worker} sent a heartbeat after it was gone")
                elif worker not in self.gone:
                    self.gone[worker] = line["seq"]
                    overdue = min(line["lease_seconds"], 2 * line["heartbeat_seconds"] + 0.5)
                    silent = (line["silent_micros"] or 0) / 1e6
                    if line["what"] == "db.lost" and silent < overdue - 0.1:
                        self._say("I3", f"worker {worker} was declared dead after {silent:.2f} s")

    def _check_leases(self, task: TaskHistory) -> None:
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

    def _check_executions(self, task: TaskHistory) -> None:
        starts, ends = task.seen("start"), task.seen("end")
        for start in starts:
            claim = task.claims.get(start["lease"])
            if claim is None:
                self._say("I4", f"it ran under lease {start['lease']}, which was never given", task)
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

    def _check_fence(self, task: TaskHistory, end: Line) -> None:
        """
        A handler in the event loop can be stopped immediately, so it must not run on after a
        whole lease without a heartbeat, unless the process was frozen.
        """
        if end["isolation"] != "loop":
            return
        claim = task.claims.get(end["lease"], {"worker": None})
        beats = self.beats.get(claim["worker"], [])
        number = bisect_right(beats, end["us"])
        if not number:
            return
        beat = beats[number - 1]
        silent = end["us"] - beat
        if silent <= self.lease_us + FENCE_SLACK_US:
            return
        for pid, begin, until in self.frozen:
            if pid == end["pid"]:
                # It may take a moment to notice.
                if begin <= end["us"] <= until + FENCE_SLACK_US:
                    return
                silent -= max(0, min(until, end["us"]) - max(begin, beat))
        if silent > self.lease_us + FENCE_SLACK_US:
            self._say(
                "I4", f"it ran on {silent / 1e6:.1f} s after its worker's last heartbeat", task
            )

    def _check_times(self, task: TaskHistory) -> None:
        for claim in task.claims.values():
            if claim["now"] < claim["old_run_at"]:
                early = claim["old_run_at"] - claim["now"]
                self._say("I5", f"it was claimed {early} µs before its time", task)
            if claim["expires_at"] and claim["now"] > claim["expires_at"]:
                self._say("I5", "it was claimed after it had expired", task)
            if claim["cancel_requested"]:
                self._say("I5", "it was claimed after its cancellation was requested", task)

    def _check_cancellation(self, task: TaskHistory) -> None:
        asked = [line["us"] for line in task.seen("cancel.invoke")]
        for move in task.moves:
            if move["new"] != "cancelled" or move["old"] == "cancelled":
                continue
            if move["kind"] == "Expired":
                if move["expires_at"] is None or move["now"] < move["expires_at"]:
                    self._say("I5", "it expired before its time", task)
            elif not asked or asked[0] > move["us"] + CLOCK_SLACK_US:
                self._say("I5", "it was cancelled without a request", task)

    def _check_counts(self, task: TaskHistory) -> None:
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
            self._say("I6", f"{releases} attempts were released", task)

    def _check_backoff(self, task: TaskHistory, move: Line, charged: int) -> None:
        if not charged or move["kind"] in ("WorkerLost", "Crashed"):
            return  # After a crash the first retry is due immediately.
        base, cap = self.h.plan["backoff"]
        least = min(cap, base * 2 ** (move["failures"] - 1))
        wait = (move["run_at"] - move["now"]) / 1e6
        if wait < 0.95 * least:
            self._say("I6", f"due again after {wait:.3f} s instead of {least:g} s", task)

    def _check_result(self, task: TaskHistory) -> None:
        for move in task.moves:
            if move["old"] != "running":
                continue
            if move["new"] == "completed" and move["result_lease"] != move["old_lease"]:
                other = move["result_lease"]
                self._say("I7", f"lease {move['old_lease']} recorded a result of {other}", task)
            named = re.search(r"lease=([0-9a-f-]{36})", move["message"] or "")
            if named and move["new"] != "completed" and named[1] != move["old_lease"]:
                other = named[1]
                self._say("I7", f"lease {move['old_lease']} recorded the failure of {other}", task)
        row, submission = task.row, task.submission
        if row is None or submission is None:
            return
        if row["state"] != "completed":
            if row["has_result"]:
                self._say("I7", f"it is {row['state']} and has a result", task)
            return
        if row["result_digest"] != submission["digest"]:
            self._say("I7", "its result is not that of its payload", task)
        if row["result_submission"] != submission["n"]:
            self._say("I7", f"its result is that of submission {row['result_submission']}", task)
        if row["result_attempt"] != row["attempt"] or row["result_lease"] != row["lease"]:
            self._say("I7", "its result is not that of its last attempt", task)
        if task.recipe == "big" and row["result_blob"] != 200_000:
            self._say("I7", f"its result was cut to {row['result_blob']}", task)
        if row["attempt"] <= submission["times"] or task.recipe in ("doom", "exit", "stubborn"):
            self._say("I7", f"a task that must fail ({task.recipe}) completed", task)

    def _check_end(self) -> None:
        for drained in self.h.kinds["drained"]:
            for queue in drained["queues"]:
                if queue["messages"]:
                    self._say("I13", f"{queue['messages']} messages are left in {queue['name']}")
            if drained["redelivered"] > REDELIVERIES_MAX * self.claimed:
                self._say("I16", f"{drained['redelivered']} redeliveries of {self.claimed} claims")
        for line in self.h.kinds["process.ended"]:
            if line["final"] and line["status"] != 0:
                self._say("I13", f"{line['who']} was asked to stop and ended with {line['status']}")
            if not line["asked"]:
                self._say("I13", f"{line['who']} ended unexpectedly, with {line['status']}")
        for fault in self.h.kinds["fault.end"]:
            is_known = fault["kind"] == "terminate" and fault["evidence"]
            if is_known and not fault["detail"].endswith("with 0"):
                self._say("I13", f"{fault['target']} on SIGTERM: {fault['detail']}")

    def _check_reads(self, task: TaskHistory) -> None:
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

    def _check_logs(self, task: TaskHistory) -> None:
        left = {(m["old_attempt"], m["new"]) for m in task.moves if m["old"] == "running"}
        lost = {m["old_attempt"] for m in task.moves if m["kind"] == "WorkerLost"}
        for line in task.logs:
            if line["event"] == "attempt.void":
                self.fenced += line["attempt"] in lost
            else:
                may_be = {(line["attempt"], new) for new in SETTLED_AS[line["outcome"]]}
                if not may_be & left:
                    told = f"attempt {line['attempt']} as {line['outcome']}"
                    self._say("I15", f"{line['who']} reports {told}, the database does not", task)


def shortcomings(h: Histories, *, completed: int, fenced: int) -> list[str]:
    """
    The reasons why this run proves nothing; empty if it proves something.
    """
    bit = {fault["kind"] for fault in h.kinds["fault.end"] if fault["evidence"]}
    ended = {phase["phase"] for phase in h.kinds["phase"]} >= {"stopping"} and h.kinds["drained"]
    facts = {
        **{f"fault {kind} never took effect": kind not in bit for kind in h.plan["kinds"]},
        "no task was accepted": not h.counts["submit.ok"],
        "the database recorded nothing": not h.counts["db.submit"],
        "no task completed": not completed,
        "no zombie was fenced": "pause" in h.plan["kinds"] and not fenced,
        "the run did not complete": not ended,
    }
    return [reason for reason, is_so in facts.items() if is_so]


@dataclass
class Judgement:
    """
    The result of checking a run.

    Attributes:
        status: The exit status.
        fenced: How many attempts lost their lease while they ran, and recorded nothing.
    """

    status: int
    violations: list[Violation]
    shortcomings: list[str]
    fenced: int


def judge(
    histories: Histories,
    look: Callable[[TaskHistory, list[Violation]], None] = lambda task, wrong: None,
) -> Judgement:
    """
    Judge a run. Its histories can be read only once, so `look` gets the tasks at the same time.
    """
    checker = Checker(histories)
    violations = checker.run(look)
    reasons = shortcomings(histories, completed=checker.completed, fenced=checker.fenced)
    status = VIOLATED if violations else INVALID if reasons else PASSED
    return Judgement(status, violations, reasons, checker.fenced)


def main() -> int:
    """
    Print the verdict on the folder that the first argument names.
    """
    verdict = judge(Histories(Path(sys.argv[1])))
    told = [f"{v.invariant} {v.fact} {v.task or ''}" for v in verdict.violations]
    sys.stdout.write("\n".join([*told, *verdict.shortcomings, VERDICTS[verdict.status], ""]))
    return verdict.status


if __name__ == "__main__":
    sys.exit(main())
