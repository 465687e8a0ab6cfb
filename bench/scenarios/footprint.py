"""
What idle processes use: memory, and CPU over some seconds.

`drain` measures memory under load and the time from start to first task.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from bench.addresses import program
from bench.entrants import Entrant
from bench.processes import Processes, running
from bench.run import Measurement, Run
from bench.systems.asyncflow import environment

NAME = "footprint"

SETTLE_SECONDS = 4.0
WATCH_SECONDS = 4.0


def measurements(run: Run) -> list[Measurement]:
    """
    One worker of every entrant, and AsyncFlow's other processes.
    """
    # Peers only once: the sizes of idle processes hardly vary.
    workers = [
        Measurement(
            entrant,
            {"process": "worker"},
            partial(worker, run, entrant),
            once=not entrant.is_ours,
        )
        for entrant in run.entrants
        if entrant.is_ours or entrant.is_plain
    ]
    others = [
        Measurement(entrant, {"process": kind}, partial(other, run, entrant, kind), once=True)
        for entrant in run.entrants
        if entrant.is_ours
        for kind in ("api", "maintenance")
    ]
    return workers + others


def worker(run: Run, entrant: Entrant) -> dict[str, Any]:
    """
    Measure an idle worker; with RabbitMQ, AsyncFlow's first process only.
    """
    system = run.prepare(entrant)
    commands = system.worker_commands(1, entrant.latency)[:1]
    with running(commands, environment=run.environment(entrant), log=run.log(entrant)) as processes:
        return _watch(run, processes)


def other(run: Run, entrant: Entrant, kind: str) -> dict[str, Any]:
    """
    Measure an idle API or maintenance process.
    """
    run.prepare(entrant)
    with running(
        [[program("asyncflow"), kind]],
        environment={**run.environment(entrant), **environment()},
        log=run.log(entrant),
    ) as processes:
        return _watch(run, processes)


def _watch(run: Run, processes: Processes) -> dict[str, Any]:
    time.sleep(SETTLE_SECONDS)
    before = run.services.cpu_seconds() | {"process": processes.cpu_seconds()}
    time.sleep(WATCH_SECONDS)
    after = run.services.cpu_seconds() | {"process": processes.cpu_seconds()}
    processes.check()
    return {
        **processes.memory_mb(),
        "idle_cpu_percent": {
            kind: round((after[kind] - before[kind]) / WATCH_SECONDS * 100, 2) for kind in after
        },
    }
