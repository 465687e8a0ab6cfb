"""
Submitting while draining for minutes: do tables stay small and latency steady?

A flow at half of what the system sustains, plus a trickle of numbered tasks. Sampled every few
seconds: latency of the latest ones, dead tuples, sizes of tables and indexes, backlog. The run is
long on PostgreSQL alone; with RabbitMQ the tables are the same, and a shorter run suffices.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import psycopg
from psycopg.rows import dict_row

from bench.addresses import database_url
from bench.entrants import Entrant
from bench.run import Measurement, Run, finish_producing, quantiles
from bench.scenarios.latency import find_capacity, wait_until_warm

NAME = "sustained"

PERIOD_SECONDS = 0.02
SAMPLE_SECONDS = 5.0
SHARE_WITH_RABBITMQ = 0.3

LOOK = """
    SELECT (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'tasks_live') AS dead,
           (SELECT autovacuum_count FROM pg_stat_user_tables
             WHERE relname = 'tasks_live') AS vacuums,
           pg_table_size('asyncflow.tasks_live') AS live_table_bytes,
           pg_indexes_size('asyncflow.tasks_live') AS live_index_bytes,
           pg_table_size('asyncflow.tasks_finished') AS finished_table_bytes,
           pg_indexes_size('asyncflow.tasks_finished') AS finished_index_bytes,
           (SELECT count(*) FROM asyncflow.tasks_live) AS unfinished
"""


def measurements(run: Run) -> list[Measurement]:
    """
    Each of AsyncFlow's engines once.
    """
    return [
        Measurement(entrant, {}, partial(measure, run, entrant), once=True)
        for entrant in run.entrants
        if entrant.is_ours
    ]


def measure(run: Run, entrant: Entrant) -> dict[str, Any]:
    """
    Run minutes of load; the samples are part of the result.
    """
    system = run.prepare(entrant)
    seconds = 60 * run.sizes.minutes * (SHARE_WITH_RABBITMQ if entrant.needs_broker else 1)
    callers = max(entrant.producers)
    with run.workers(entrant, system, processes=1, concurrency=entrant.drain) as workers:
        wait_until_warm(run, entrant)
        capacity = find_capacity(run, entrant, callers)
        before = run.services.cpu_seconds() | {"workers": workers.cpu_seconds()}
        calls = run.probe.calls()
        flow = run.start_producing(entrant, "flow", capacity / 2, seconds, callers)
        count = round(seconds / PERIOD_SECONDS)
        trickle = run.start_producing(entrant, "trickle", count, PERIOD_SECONDS, 1)
        samples = _samples(run, seconds, count)
        reached = finish_producing(flow)
        finish_producing(trickle)
        after = run.services.cpu_seconds() | {"workers": workers.cpu_seconds()}
        calls = run.probe.calls() - calls
        memory = workers.memory_mb()
    return {
        "capacity_per_second": round(capacity, 1),
        "flow_per_second": round(reached, 1),
        "seconds": seconds,
        **quantiles(run.probe.latencies(1, 1 + count)),
        "cpu_us_per_task": {k: round((after[k] - before[k]) / calls * 1e6, 1) for k in after},
        "loaded": memory,
        "samples": samples,
    }


def _samples(run: Run, seconds: float, count: int) -> list[dict[str, Any]]:
    samples = []
    start = time.perf_counter()
    seen = 1
    for step in range(1, int(seconds / SAMPLE_SECONDS) + 1):
        time.sleep(max(0.0, start + step * SAMPLE_SECONDS - time.perf_counter()))
        elapsed = time.perf_counter() - start
        upto = min(1 + count, max(seen, round(elapsed / PERIOD_SECONDS)))
        latencies = run.probe.latencies(seen, upto)
        seen = upto
        samples.append({"seconds": round(elapsed, 1), **quantiles(latencies), **_look()})
    return samples


def _look() -> dict[str, Any]:
    with psycopg.connect(database_url(), row_factory=dict_row) as connection:
        return dict(connection.execute(LOOK).fetchone() or {})
