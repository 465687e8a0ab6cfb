"""
Latency from just before the submitting call to the handler's first statement.

`idle`: one task every 20 ms and nothing else. `half load`: the same beside a steady flow at
half of what the system, submitting and working at the same time, was just found to sustain.
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
    # Where a peer keeps results afterwards makes no difference to a start.
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
    One trickle into an idle system.
    """
    system = run.prepare(entrant)
    # A p99 is made of the slowest hundredth: of fewer tasks, it would be chance.
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
    One trickle beside half of the load that the system can sustain.
    """
    system = run.prepare(entrant)
    count = run.tasks(300)
    callers = max(entrant.producers)
    with run.workers(entrant, system, processes=1, concurrency=entrant.drain):
        wait_until_warm(run, entrant)
        capacity = find_capacity(run, entrant, callers)
        seconds = count * PERIOD_SECONDS + 3.0
        flow = run.start_producing(entrant, "flow", capacity / 2, seconds, callers)
        time.sleep(1.5)  # Until the flow flows.
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
    Tasks per second while submitting flat out and working at the same time.
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
