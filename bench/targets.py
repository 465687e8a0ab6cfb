"""
AsyncFlow's targets, and how each figure follows from the raw lines.

All but memory, startup time and the aims for latency are ratios within one run, because absolute
figures depend on the machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from bench.lines import Lines

WRITE_STATE_FIRST = ("naive", "procrastinate", "pgqueuer", "awa")
"""Peers that store a task in the database before they run it, as AsyncFlow does."""

COMPARED = {
    "http": ("naive",),
    "submit": ("pgqueuer", "taskiq"),
    "drain": ("pgqueuer", "taskiq-results", "celery-results"),
    "latency": WRITE_STATE_FIRST,
}
"""Per scenario, the peers named by a target. They are measured as often as AsyncFlow."""


@dataclass(frozen=True, slots=True)
class Target:
    """
    One line of the table.

    Attributes:
        must, aim: Bounds of the figure; None means there is none.
        at_least: Whether the bounds are lower bounds; otherwise they are upper bounds.
        figure: The measured value; None if it was not measured.
    """

    what: str
    unit: str
    must: float | None
    aim: float | None
    at_least: bool
    figure: float | None

    @property
    def verdict(self) -> str:
        """
        `met`, `met, aim too`, `missed`, or `not measured`.
        """
        if self.figure is None:
            return "not measured"
        if self.must is not None and not self._reaches(self.must):
            return "**missed**"
        if self.aim is None:
            return "met"
        if self._reaches(self.aim):
            return "met, aim too"
        return "met" if self.must is not None else "aim missed"

    def _reaches(self, bound: float) -> bool:
        assert self.figure is not None
        return self.figure >= bound if self.at_least else self.figure <= bound


def targets(lines: Lines) -> Iterator[Target]:
    """
    Yield every target with its figure from this run.
    """
    post = {"connections": 32, "tasks_per_request": 1}
    yield _ratio(
        "POST, 32 connections: rate against naive",
        7,
        9.5,
        lines.median("per_second", "http", "asyncflow", **post),
        lines.median("per_second", "http", "naive", **post),
    )
    yield _ratio(
        "POST, 32 connections: naive's p99 against ours",
        6,
        None,
        lines.median("p99_ms", "http", "naive", **post),
        lines.median("p99_ms", "http", "asyncflow", **post),
    )
    yield from _submits(lines)
    yield from _drains(lines)
    yield from _latencies(lines)
    yield from _history(lines)
    for system, title in ENGINES:
        yield _ratio(
            f"tasks that wait, {title}: 5 workers against 1",
            4.9,
            None,
            lines.median("per_second", "waiting", system, workers=5),
            lines.median("per_second", "waiting", system, workers=1),
        )
    yield from _footprints(lines)


ENGINES = (("asyncflow", "PostgreSQL alone"), ("asyncflow-rabbitmq", "RabbitMQ"))


def _submits(lines: Lines) -> Iterator[Target]:
    ours = lines.median("per_second", "submit", "asyncflow", api="one", callers=32)
    for peer, must, aim in (("pgqueuer", 2.5, 3.5), ("taskiq", 1.5, None)):
        theirs = lines.median("per_second", "submit", peer, api="one", callers=32)
        yield _ratio(f"submit, 32 callers: rate against {peer}", must, aim, ours, theirs)
    yield _ratio(
        "bulk submit: rate against pgqueuer",
        1.2,
        1.5,
        lines.median("per_second", "submit", "asyncflow", api="bulk"),
        lines.median("per_second", "submit", "pgqueuer", api="bulk"),
    )


def _drains(lines: Lines) -> Iterator[Target]:
    one = {"workers": 1, "payload": "small"}
    two = {"workers": 2, "payload": "small"}
    against: tuple[tuple[str, dict[str, object], float, float | None], ...] = (
        ("pgqueuer", one, 1.05, 1.5),
        ("taskiq-results", one, 12, None),
        ("celery-results", one, 50, None),
        ("pgqueuer", two, 1.05, 1.45),
    )
    for system, title in ENGINES:
        for peer, case, must, aim in against:
            plural = "s" if case["workers"] != 1 else ""
            yield _ratio(
                f"drain, {title}, {case['workers']} worker{plural}: rate against {peer}",
                must,
                aim,
                lines.median("per_second", "drain", system, **case),
                lines.median("per_second", "drain", peer, **case),
            )


def _latencies(lines: Lines) -> Iterator[Target]:
    for system, title in ENGINES:
        for field, aim in (("p50_ms", 2.5), ("p99_ms", 4.0)):
            name = field.removesuffix("_ms")
            ours = lines.median(field, "latency", system, load="idle")
            peers = [lines.median(field, "latency", p, load="idle") for p in WRITE_STATE_FIRST]
            best = min((peer for peer in peers if peer is not None), default=None)
            yield _bound(f"idle latency, {title}: {name}", "ms", best, aim, ours)


def _history(lines: Lines) -> Iterator[Target]:
    measured = lines.of("history", "asyncflow")[:1]
    for verb in ("claim", "settle"):
        rates: dict[str, float | None] = {"long": None, "empty": None}
        millions = 10.0
        for line in measured:
            millions = line["finished"] / 1e6
            for length in rates:
                rates[length] = statistics.median(each[verb] for each in line["rounds"][length])
        what = f"{verb} with {millions:g} M finished tasks against none"
        yield _ratio(what, 0.95, None, rates["long"], rates["empty"])


def _footprints(lines: Lines) -> Iterator[Target]:
    for system, title in ENGINES:
        mebibytes = lines.median("rss_mb", "footprint", system, process="worker")
        memory = mebibytes and mebibytes * 2**20 / 1e6
        yield _bound(f"idle worker, {title}: RSS", "MB", 45, 40, memory)
    start = lines.median("first_task_seconds", "drain", "asyncflow", workers=1, payload="small")
    yield _bound("worker start to first task", "s", 0.4, 0.3, start)


def _ratio(
    what: str, must: float, aim: float | None, numerator: float | None, divisor: float | None
) -> Target:
    figure = numerator / divisor if numerator and divisor else None
    return Target(what, "×", must, aim, at_least=True, figure=figure)


def _bound(what: str, unit: str, must: float | None, aim: float, figure: float | None) -> Target:
    return Target(what, unit, must, aim, at_least=False, figure=figure)
