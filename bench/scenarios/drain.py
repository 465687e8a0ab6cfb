"""
Drain: with a backlog waiting, workers start, and the clock runs until the last task is settled.

The rate is measured from the time every worker process has run its first task, so that startup,
measured separately, does not distort it, until durable state has no unfinished task.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bench.entrants import Entrant
from bench.processes import Processes
from bench.profiles import profile
from bench.run import Measurement, Run, wait_until
from bench.systems import System
from bench.systems.asyncflow import TASK, TEXT_BYTES
from bench.targets import COMPARED

NAME = "drain"

SECONDS_MAX = 300.0


def measurements(run: Run) -> list[Measurement]:
    """
    One and two worker processes for all systems; heavier and failing tasks for AsyncFlow.
    """
    plain = [
        _measurement(
            run,
            entrant,
            entrant.drain_tasks,
            workers,
            "small",
            once=not _is_compared(entrant, workers),
        )
        for workers in (1, 2)
        for entrant in run.entrants
    ]
    heavier = [
        _measurement(run, entrant, tasks, 1, payload, fill, once=True)
        for payload, tasks, fill in (
            ("1 KB", 50_000, {TEXT_BYTES: "1000"}),
            ("64 KB", 5_000, {TEXT_BYTES: "64000"}),
            ("10 % fail once", 50_000, {TASK: "bench-flaky"}),
        )
        for entrant in run.entrants
        if entrant.is_ours
    ]
    return plain + heavier


def _is_compared(entrant: Entrant, workers: int) -> bool:
    if entrant.is_ours or entrant.key not in COMPARED[NAME]:
        return entrant.is_ours
    # Systems that only keep results are an order of magnitude away, which one worker shows.
    return entrant.is_plain or workers == 1


def _measurement(
    run: Run,
    entrant: Entrant,
    tasks: int,
    workers: int,
    payload: str,
    fill: Mapping[str, str] | None = None,
    *,
    once: bool,
) -> Measurement:
    def measure() -> dict[str, Any]:
        system = run.prepare(entrant)
        count = run.tasks(tasks)
        run.produce(entrant, "fill", count, BENCH_FILLS="yes", **(fill or {}))
        run.services.vacuum()
        with run.workers(
            entrant, system, processes=workers, concurrency=entrant.drain
        ) as processes:
            run.wait_for_workers(processes)
            with profile(run, f"drain-{entrant.key}-{workers}-{payload}", processes.pids):
                return _timed(run, system, processes, workers=workers, tasks=count)

    return Measurement(entrant, {"workers": workers, "payload": payload}, measure, once)


def _timed(
    run: Run,
    system: System,
    processes: Processes,
    *,
    workers: int,
    tasks: int,
) -> dict[str, Any]:
    probe = run.probe
    deadline = processes.started_at + SECONDS_MAX
    run.wait_for_workers(processes, count=workers)
    begun, calls_before = time.perf_counter(), probe.calls()
    cpu_before = _cpu_seconds(run, processes)
    # A retry is a second call, so the end shows in durable state, not in the number of calls.
    wait_until(lambda: probe.calls() >= tasks, seconds=deadline - time.perf_counter())
    wait_until(
        lambda: system.unfinished(tasks) == 0,
        seconds=deadline - time.perf_counter(),
        poll_seconds=0.01,
    )
    ended = time.perf_counter()
    cpu_after = _cpu_seconds(run, processes)
    counted = tasks - calls_before
    return {
        "per_second": round(counted / (ended - begun), 1),
        "tasks": tasks,
        "counted": counted,
        "seconds": round(ended - begun, 3),
        "first_task_seconds": round(min(s.first for s in probe.slots()) - processes.started_at, 3),
        "cpu_us_per_task": {
            kind: round((cpu_after[kind] - cpu_before[kind]) / counted * 1e6, 1)
            for kind in cpu_after
        },
        "loaded": processes.memory_mb(),
    }


def _cpu_seconds(run: Run, processes: Processes) -> dict[str, float]:
    return {"workers": processes.cpu_seconds(), **run.services.cpu_seconds()}
