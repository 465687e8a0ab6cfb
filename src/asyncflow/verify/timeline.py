"""
The history of one task: all observations of it, in order.
"""

from __future__ import annotations

from asyncflow.verify.checker import Histories, Line, TaskHistory

BEFORE_US, AFTER_US = 5_000_000, 1_000_000
"""How long before and after a task's life a fault is included."""


def timeline(h: Histories, task: TaskHistory) -> list[str]:
    """
    One line per observation, for people.
    """
    told = _by_clients(task) + _by_others(task)
    if told:
        told += _around(h, task, first=min(told)[0], last=max(told)[0])
    origin = min((line["us"] for line in h.kinds["clock"]), default=0)
    return [f"{(at - origin) / 1e6:10.3f} s  {who:<16} {fact}" for at, who, fact in sorted(told)]


def _by_clients(task: TaskHistory) -> list[tuple[int, str, str]]:
    told = []
    if task.submission is not None:
        told.append((task.submission["us"], "client", f"submits a {task.recipe} task"))
    for line in task.lines:
        if line["what"].startswith(("submit.ok", "cancel.", "redrive.")):
            state = f" {line['state']}" if line.get("state") else ""
            told.append((line["us"], "client", line["what"].replace(".", " ") + state))
    for line in task.seen("read"):
        told.append((line["us"], "client", f"reads {line['state']} attempt {line['attempt']}"))
    return told


def _by_others(task: TaskHistory) -> list[tuple[int, str, str]]:
    told = [(line["us"], "database", _move_in_words(line)) for line in task.history]
    for line in task.seen("start") + task.seen("end"):
        how = line.get("how", "starts")
        told.append((line["us"], f"handler {line['pid']}", f"{how}, lease {_short(line['lease'])}"))
    return told


def _around(
    h: Histories, task: TaskHistory, *, first: int, last: int
) -> list[tuple[int, str, str]]:
    told = []
    for line in h.kinds["fault.start"] + h.kinds["fault.end"]:
        if first - BEFORE_US < line["us"] < last + AFTER_US:
            fact = f"{line['kind']} {line['target']}: {line.get('detail', 'begins')}"
            told.append((line["us"], "nemesis", fact))
    for worker in {move["worker"] for move in task.moves} - {None}:
        for line in h.workers[worker]:
            if line["what"] != "db.heartbeat":
                word = line["what"].removeprefix("db.")
                told.append((line["us"], "database", f"worker {_short(worker)} {word}"))
    return told


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
