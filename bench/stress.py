"""
Operators' actions and incidents, timed: workers stopped under load, a broker erased during a
backlog, an alarm, more tasks than the workers can run. The results are recorded in
docs/internals/reliability-runs.md.

    python -m bench.stress {stops,erase,alarm,overload} [--engine rabbitmq] [--rabbitmq 4.3]

Real processes on dedicated servers, with default settings. Prints one line of JSON at the end;
exits with status 1 if an accepted task did not complete.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from bench.by_hand import end_on_sigterm, running_broker
from tests.support import postgres, rabbitmq
from tests.support.broker import Broker
from tests.support.process import Process
from tests.support.system import System

STOPS = 50
STOP_SECONDS_MAX = 60.0
BACKLOG = 12_000
PROBES, PROBE_SECONDS = 1_000, 0.01
OVERLOAD_SECONDS = 60.0
OVERLOAD_TIMES = 5.0
WORKERS_ADDED, SLOTS_ADDED = 2, 100
SLOTS, TASK_SECONDS = 10, 0.02
END_SECONDS_MAX = 600.0

Facts = dict[str, Any]


async def stops(system: System, _broker: Broker | None) -> Facts:
    """
    Stop each of three workers in turn while tasks flow, and start a replacement.
    """
    _, workers, _ = await system.start(workers=3)
    took: list[float] = []
    async with system.load(payload={"seconds": 0.2}, clients=8, pause_seconds=0.01) as load:
        for _ in range(STOPS):
            await load.has_accepted(20)
            workers.append(await system.start_worker())
            leaving = workers.pop(0)
            began = time.monotonic()
            leaving.send(signal.SIGTERM)
            assert await leaving.exit_status(timeout_seconds=STOP_SECONDS_MAX) == 0
            took.append(time.monotonic() - began)
    states = await system.all_terminal(load.accepted, timeout_seconds=END_SECONDS_MAX)
    starts = Counter(entry.task_id for entry in system.journal.entries(what="start"))
    return {
        "stops": len(took),
        **_ends(load.accepted, states),
        "refused": sum(load.refused.values()) + load.broken,
        "started_twice": sum(count > 1 for count in starts.values()),
        "stop_p50_seconds": _rounded(statistics.median(took)),
        "stop_max_seconds": _rounded(max(took)),
    }


async def erase(system: System, broker: Broker | None) -> Facts:
    """
    Erase the disk of a RabbitMQ that holds the hints of a backlog.
    """
    assert broker is not None, "erase needs --engine rabbitmq"
    await system.start(workers=1, worker_slots=SLOTS)
    accepted: list[str] = []
    while len(accepted) < BACKLOG:
        accepted += await system.submit_batch([_task(TASK_SECONDS)] * 1_000)
    began, done_before = time.monotonic(), (await system.states(accepted))["completed"]
    await asyncio.to_thread(broker.wipe)
    # Restoring the virtual host is the operator's job; the queues are AsyncFlow's own.
    assert system.broker_url is not None
    broker.api("PUT", f"vhosts/{system.broker_url.rpartition('/')[2]}", {})
    is_back = time.monotonic()
    await system.is_drained(timeout_seconds=END_SECONDS_MAX)
    drained_seconds = time.monotonic() - is_back
    states = await system.states(accepted)
    return {
        "waiting_when_erased": len(accepted) - done_before,
        **_ends(accepted, states),
        "broker_away_seconds": _rounded(is_back - began),
        "drained_after_seconds": _rounded(drained_seconds),
        "at_best_seconds": _rounded((len(accepted) - done_before) * TASK_SECONDS / SLOTS),
    }


async def alarm(system: System, broker: Broker | None) -> Facts:
    """
    Submit a task every 10 ms: normally, during a memory alarm, and with the broker down.
    """
    assert broker is not None, "alarm needs --engine rabbitmq"
    await system.start()
    await _probe(system, 100)
    calm = await _probe(system, PROBES)
    await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0")
    alarmed = await _probe(system, PROBES)
    await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.6")
    await asyncio.to_thread(broker.stop)
    away = await _probe(system, PROBES)
    await asyncio.to_thread(broker.start)
    accepted = [task_id for task_ids, _ in (calm, alarmed, away) for task_id in task_ids]
    states = await system.all_terminal(accepted, timeout_seconds=END_SECONDS_MAX)
    named = {"calm": calm, "alarm": alarmed, "away": away}
    return _ends(accepted, states) | {
        f"{name}_{quantile}_ms": _quantile_ms(took, percent)
        for name, (_, took) in named.items()
        for quantile, percent in (("p50", 50), ("p99", 99))
    }


async def overload(system: System, _broker: Broker | None) -> Facts:
    """
    Submit five times what a worker can run for a minute, with single submissions in between; then
    add more workers. These are few with many slots, since the tasks only wait and cores are scarce.
    """
    apis, workers, maintenances = await system.start(worker_slots=SLOTS)
    processes = [*apis, *workers, *maintenances]
    await _probe(system, 100)
    _, calm = await _probe(system, PROBES)
    memory_before = [_mebibytes(process) for process in processes]
    capacity = SLOTS / TASK_SECONDS
    flood: list[str] = []
    began = time.monotonic()
    probing = asyncio.create_task(_probe(system, PROBES))
    while (elapsed := time.monotonic() - began) < OVERLOAD_SECONDS:
        wanted = int(elapsed * capacity * OVERLOAD_TIMES) - len(flood)
        if wanted > 0:
            flood += await system.submit_batch([_task(TASK_SECONDS)] * min(1_000, wanted))
        await asyncio.sleep(PROBE_SECONDS)
    offered = len(flood) / (time.monotonic() - began)
    probed, during = await probing
    memory_after = [_mebibytes(process) for process in processes]
    began = time.monotonic()
    urgent = await system.submit("work", priority=9)
    await system.finishes(urgent)
    urgent_seconds = time.monotonic() - began
    probed_after, after = await _probe(system, PROBES)
    done = (await system.states(flood))["completed"]
    began = time.monotonic()
    added = {"workers": WORKERS_ADDED, "worker_slots": SLOTS_ADDED}
    await system.start(apis=0, maintenances=0, **added)
    await system.is_drained(timeout_seconds=END_SECONDS_MAX)
    drained_seconds = time.monotonic() - began
    accepted = [*flood, *probed, *probed_after, urgent]
    states = await system.states(accepted)
    return {
        "offered_per_second": round(offered),
        "capacity_per_second": round(capacity),
        **_ends(accepted, states),
        "waiting_afterwards": len(flood) - done,
        "post_p99_ms_before": _quantile_ms(calm, 99),
        "post_p99_ms_during": _quantile_ms(during, 99),
        "post_p99_ms_after": _quantile_ms(after, 99),
        "mebibytes_before": memory_before,
        "mebibytes_after": memory_after,
        "urgent_task_seconds": _rounded(urgent_seconds),
        **added,
        "drained_after_seconds": _rounded(drained_seconds),
    }


SCENES: dict[str, Callable[[System, Broker | None], Awaitable[Facts]]] = {
    scene.__name__: scene for scene in (stops, erase, alarm, overload)
}


async def _probe(system: System, count: int) -> tuple[list[str], list[float]]:
    """
    Submit `count` tasks, one every 10 ms; return their ids and the seconds until each 202.
    """
    task_ids, took = [], []
    for _ in range(count):
        began = time.monotonic()
        task_ids.append(await system.submit("work"))
        took.append(time.monotonic() - began)
        await asyncio.sleep(max(0.0, PROBE_SECONDS - took[-1]))
    return task_ids, took


def _task(seconds: float) -> Facts:
    # Not sample-task, which wakes up twenty times to report progress.
    return {"name": "work", "payload": {"seconds": seconds}}


def _ends(accepted: Sequence[str], states: Counter[str]) -> Facts:
    return {"accepted": len(accepted), "completed": states["completed"], "lost": states["missing"]}


def _mebibytes(process: Process) -> float:
    return _rounded(psutil.Process(process.pid).memory_info().rss / 1024**2)


def _quantile_ms(seconds: Sequence[float], percent: int) -> float:
    return _rounded(1_000 * statistics.quantiles(seconds, n=100)[percent - 1])


def _rounded(value: float) -> float:
    return round(value, 2)


async def _perform(options: argparse.Namespace, database_url: str, broker: Broker | None) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        async with System(
            database_url=database_url,
            broker_url=None if broker is None else broker.create_vhost(),
            folder=Path(folder),
        ) as system:
            return await SCENES[options.scene](system, broker)


def main() -> int:
    """
    Start the servers, run the scene, and print the results.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.stress")
    parser.add_argument("scene", choices=list(SCENES))
    parser.add_argument("--engine", choices=["postgres", "rabbitmq"], default="postgres")
    parser.add_argument("--rabbitmq", choices=rabbitmq.VERSIONS, default=rabbitmq.OLDEST)
    options = parser.parse_args()
    end_on_sigterm()
    with ExitStack() as stack:
        server = stack.enter_context(postgres.running_server("18"))
        broker = stack.enter_context(running_broker(options.engine, options.rabbitmq))
        versions = {"rabbitmq": broker.version} if broker else {}
        facts = asyncio.run(_perform(options, server.create_database(), broker))
    print(json.dumps({"scene": options.scene, **versions, **facts}), flush=True)
    return 1 if facts["completed"] != facts["accepted"] else 0


if __name__ == "__main__":
    sys.exit(main())
