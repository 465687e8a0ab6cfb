"""
One, three and five workers on tasks that wait 0.5 to 5 seconds: does adding workers add speed?

The backlog is larger than the measurement can finish. Counted are tasks that start within a
window in the middle, when every slot is in use.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from bench.entrants import Entrant
from bench.run import Measurement, Run
from bench.systems.asyncflow import TASK

NAME = "waiting"

SLOTS = 100
WAIT_SECONDS_MEAN = 2.75
RAMP_SECONDS = 6.0
WINDOW_SECONDS = 20.0


def measurements(run: Run) -> list[Measurement]:
    """
    Both engines of AsyncFlow; a peer would only show that waiting costs nothing.
    """
    return [
        Measurement(
            entrant,
            {"workers": workers},
            partial(
                measure,
                run,
                entrant,
                workers=workers,
                slots=SLOTS,
                wait_seconds=WAIT_SECONDS_MEAN,
                ramp_seconds=RAMP_SECONDS,
                window_seconds=WINDOW_SECONDS * (1 if run.sizes.share >= 1 else 1 / 3),
            ),
            once=workers == 3,  # The target concerns only one and five workers.
        )
        for workers in (1, 3, 5)
        for entrant in run.entrants
        if entrant.is_ours
    ]


def measure(
    run: Run,
    entrant: Entrant,
    *,
    workers: int = 1,
    slots: int,
    wait_seconds: float,
    ramp_seconds: float,
    window_seconds: float,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """
    Measure the rate of this many workers and slots, on tasks with this mean duration.
    """
    system = run.prepare(entrant)
    per_second = workers * slots / wait_seconds
    tasks = round(1.3 * per_second * (ramp_seconds + window_seconds) + 2 * workers * slots)
    run.produce(entrant, "fill", tasks, **{TASK: "bench-wait", **environment})
    run.services.vacuum()
    with run.workers(entrant, system, processes=workers, concurrency=str(slots)) as processes:
        run.wait_for_workers(processes, count=workers)
        time.sleep(ramp_seconds)
        begun, before = time.perf_counter(), [slot.calls for slot in run.probe.slots()]
        time.sleep(window_seconds)
        seconds, after = time.perf_counter() - begun, [s.calls for s in run.probe.slots()]
    by_worker = [last - first for first, last in zip(before, after, strict=True)]
    return {
        "per_second": round(sum(by_worker) / seconds, 2),
        "ideal_per_second": round(per_second, 2),
        "by_worker": by_worker,
        "window_seconds": round(seconds, 2),
    }
