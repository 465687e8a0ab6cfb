"""
Latency from just before the submitting call to the handler's first statement.

`idle`: one task every 20 ms and nothing else. `half load`: the same during a steady flow at half
the rate that the system was just found to sustain while submitting and working concurrently.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from bench.entrants import Entrant
from bench.run import Measurement, Run, finish_producing, quantiles, wait_until
from bench.targets import COMPARED

NAME = "latency"

PERIOD_SECONDS = 0.02
SETTLE_SECONDS = 1.0
FLAT_OUT_SECONDS = 2.0
START_SECONDS_MAX = 30.0
CATCH_UP_SECONDS_MAX = 120.0


def measurements(run: Run) -> list[Measurement]:
    """
    Idle and at half load, for both engines of AsyncFlow and every peer.
    """
    # Where a peer stores results does not affect when tasks start.
    entrants = [entrant for entrant in run.entrants if entrant.is_ours or entrant.is_plain]
    return [
        Measurement(
            entrant,
            {"load": load},
            partial(measure, run, entrant),
            once=not entrant.is_ours and (load == "half" or entrant.key not in COMPARED[NAME]),
        )
        for load, measure in (("idle", idle), ("half", half_load))
        for entrant in entrants
    ]


def idle(run: Run, entrant: Entrant) -> dict[str, Any]:
    """
    Measure a trickle of tasks into an idle system.
    """
    system = run.prepare(entrant)
    # A p99 depends on the slowest hundredth: with fewer tasks, it would be chance.
    count = run.tasks(1000)
    with run.workers(entrant, system, processes=1, concurrency=entrant.latency) as workers:
        wait_until_warm(run, entrant)
        before = run.services.cpu_seconds() | {"workers": workers.cpu_seconds()}
        run.produce(entrant, "trickle", count, PERIOD_SECONDS, 1)
        after = run.services.cpu_seconds() | {"workers": workers.cpu_seconds()}
        time.sleep(0.5)
        latencies = run.probe.latencies(1, 1 + count)
    return {
        **quantiles(latencies),
        "tasks": count,
        "missing": count - len(latencies),
        "cpu_us_per_task": {k: round((after[k] - before[k]) / count * 1e6, 1) for k in after},
    }


def half_load(run: Run, entrant: Entrant) -> dict[str, Any]:
    """
    Measure a trickle during half of the load that the system can sustain.
    """
    system = run.prepare(entrant)
    count = run.tasks(300)
    callers = max(entrant.producers)
    with run.workers(entrant, system, processes=1, concurrency=entrant.drain):
        wait_until_warm(run, entrant)
        capacity = find_capacity(run, entrant, callers)
        seconds = count * PERIOD_SECONDS + 3.0
        flow = run.start_producing(entrant, "flow", capacity / 2, seconds, callers)
        time.sleep(1.5)  # Until the flow is steady.
        run.produce(entrant, "trickle", count, PERIOD_SECONDS, 1)
        reached = finish_producing(flow)
        time.sleep(0.5)
        latencies = run.probe.latencies(1, 1 + count)
    return {
        **quantiles(latencies),
        "tasks": count,
        "missing": count - len(latencies),
        "capacity_per_second": round(capacity, 1),
        "flow_per_second": round(reached, 1),
    }


def wait_until_warm(run: Run, entrant: Entrant) -> None:
    """
    Send one task through the whole system, so that everything is connected and declared.
    """
    run.produce(entrant, "trickle", 1, 0.0, 0)
    wait_until(lambda: run.probe.calls() > 0, seconds=START_SECONDS_MAX)
    time.sleep(SETTLE_SECONDS)


def find_capacity(run: Run, entrant: Entrant, callers: int) -> float:
    """
    Tasks per second while submitting at full speed and working concurrently.
    """
    flow = run.start_producing(entrant, "flow", 0, FLAT_OUT_SECONDS, callers)
    calls = run.probe.calls()
    wait_until(lambda: run.probe.calls() > calls + 10, seconds=START_SECONDS_MAX)
    begun, calls = time.perf_counter(), run.probe.calls()
    submitted = finish_producing(flow)
    worked = (run.probe.calls() - calls) / (time.perf_counter() - begun)
    _wait_until_caught_up(run)
    return min(submitted, worked)


def _wait_until_caught_up(run: Run) -> None:
    seen = -1

    def is_quiet() -> bool:
        nonlocal seen
        before, seen = seen, run.probe.calls()
        return before == seen

    wait_until(is_quiet, seconds=CATCH_UP_SECONDS_MAX, poll_seconds=1.0)
