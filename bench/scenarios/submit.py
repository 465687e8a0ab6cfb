"""
Submit from Python: one producer process, whose calls return once the task is durable.

`one` calls the single-task API, `bulk` the bulk API with 1,000 tasks per call. Afterwards the tasks
are counted where the system keeps them, since a rate counts only if the tasks were stored.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.entrants import Entrant
from bench.run import Measurement, Run
from bench.systems import QUEUE
from bench.targets import COMPARED

NAME = "submit"

TASKS_IN_BULK = 100_000


def measurements(run: Run) -> list[Measurement]:
    """
    Every entrant one by one, and in bulk if it has an API for that.
    """
    one = [
        Measurement(
            entrant,
            {"api": "one", "callers": callers},
            partial(submit, run, entrant, "rate", run.tasks(entrant.submit_tasks), callers),
            once=_is_measured_once(entrant),
        )
        for entrant in run.entrants
        if entrant.is_plain
        for callers in entrant.producers
    ]
    bulk = [
        Measurement(
            entrant,
            {"api": "bulk"},
            partial(submit, run, entrant, "bulk", run.tasks(TASKS_IN_BULK)),
            once=_is_measured_once(entrant),
        )
        for entrant in run.entrants
        if entrant.is_plain and entrant.system in ("asyncflow", "procrastinate", "pgqueuer", "awa")
    ]
    return one + bulk


def _is_measured_once(entrant: Entrant) -> bool:
    return not entrant.is_ours and entrant.key not in COMPARED[NAME]


def submit(run: Run, entrant: Entrant, *arguments: object) -> dict[str, Any]:
    """
    Measure one producer's rate.
    """
    system = run.prepare(entrant)
    before = run.services.cpu_seconds()
    rate = run.produce(entrant, *arguments)
    after = run.services.cpu_seconds()
    count = int(str(arguments[1]))
    kept = system.unfinished(count) or run.services.messages(QUEUE)
    if kept < count:
        raise RuntimeError(f"{entrant.key} took {count} tasks and kept {kept}")
    return {
        "per_second": round(rate, 1),
        "tasks": count,
        "kept": kept,
        "cpu_us_per_task": {
            kind: round((after[kind] - before[kind]) / count * 1e6, 1) for kind in after
        },
    }
