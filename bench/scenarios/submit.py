"""
Submit from Python: one producer process, each call returns when its task is safe.

`one` calls the single-task API, `bulk` the bulk API with 1,000 tasks per call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from bench.entrants import Entrant
from bench.run import Measurement, Run

NAME = "submit"

TASKS = 20_000
OUR_TASKS = 100_000
TASKS_IN_BULK = 100_000


def measurements(run: Run) -> list[Measurement]:
    """
    Every entrant one by one, and in bulk where it has an API for that.
    """
    one = [
        Measurement(
            entrant,
            {"api": "one", "callers": callers},
            partial(submit, run, entrant, "rate", _tasks(run, entrant), callers),
        )
        for entrant in run.entrants
        if _submits_differently(entrant)
        for callers in entrant.producers
    ]
    bulk = [
        Measurement(
            entrant,
            {"api": "bulk"},
            partial(submit, run, entrant, "bulk", run.tasks(TASKS_IN_BULK)),
        )
        for entrant in run.entrants
        if _submits_differently(entrant)
        and entrant.system in ("asyncflow", "procrastinate", "pgqueuer", "awa")
    ]
    return one + bulk


def _submits_differently(entrant: Entrant) -> bool:
    # Where results go, and what will carry the hint, makes no difference here.
    return entrant.variant == ""


def _tasks(run: Run, entrant: Entrant) -> int:
    return run.tasks(OUR_TASKS if entrant.is_ours else TASKS)


def submit(run: Run, entrant: Entrant, *arguments: object) -> dict[str, Any]:
    """
    One producer's rate.
    """
    run.prepare(entrant)
    before = run.services.cpu_seconds()
    rate = run.produce(entrant, *arguments)
    after = run.services.cpu_seconds()
    count = int(str(arguments[1]))
    return {
        "per_second": round(rate, 1),
        "tasks": count,
        "cpu_us_per_task": {
            kind: round((after[kind] - before[kind]) / count * 1e6, 1) for kind in after
        },
    }
