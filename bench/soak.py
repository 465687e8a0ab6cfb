"""
Hours of healthy load: does anything grow that should not, is any task lost or run twice, is the end
slower than the beginning? Results are recorded in docs/internals/reliability-runs.md.

    python -m bench.soak [--minutes 120] [--per-second 150] [--engine rabbitmq] [--rabbitmq 4.3]

Real processes on dedicated servers: two API processes, two workers, two maintenance processes, with
default settings except for a retention of a quarter of an hour, so that the tables reach a steady
size. Prints a line of JSON per minute and one at the end, which compares the last quarter of the
time with the second; exits with status 1 if a task was lost, failed, or ran more or less often than
intended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from bench.by_hand import end_on_sigterm, running_broker
from tests.support import postgres, rabbitmq, scratch
from tests.support.broker import Broker
from tests.support.process import Process
from tests.support.system import System

STEP_SECONDS = 0.5
SAMPLE_SECONDS = 60.0
RETENTION_DAYS = 15 / (24 * 60)
END_SECONDS_MAX = 60.0
HTTP_PAUSE_SECONDS = 0.1

SERVER = """
    SELECT (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database())
               AS postgres_connections,
           pg_database_size(current_database()) / 1024^2 AS database_mebibytes,
           (SELECT sum(n_dead_tup) FROM pg_stat_user_tables)::int AS dead_rows,
           (SELECT count(*) FROM asyncflow.tasks_live)::int AS unfinished
"""

ENDED = """
    SELECT id, state FROM asyncflow.tasks_finished WHERE finished_at > to_timestamp($1)
"""

Facts = dict[str, Any]


class Soak:
    """
    The load and what is observed of it.

    Attributes:
        starts_wanted: By task, how often its handler must start.
        completed, ended_otherwise: The tasks that completed, and those that ended in another state.
        post_seconds: Seconds until the 202 of each single submission since the last sample.
    """

    def __init__(self, system: System, broker: Broker | None, *, per_second: int) -> None:
        self.starts_wanted: dict[str, int] = {}
        self.completed: set[str] = set()
        self.ended_otherwise: set[str] = set()
        self.post_seconds: list[float] = []
        self._system = system
        self._broker = broker
        self._per_second = per_second
        self._looked_at = time.time()
        self._processes: dict[str, Process] = {}
        self._is_over = False

    async def run(self, minutes: float) -> list[Facts]:
        """
        Submit continuously; return a sample per minute.
        """
        roles = ("api", "worker", "maintenance")
        started = await self._system.start(
            apis=2, workers=2, maintenances=2, retention_days=RETENTION_DAYS
        )
        self._processes = {
            f"{role} {number}": process
            for role, processes in zip(roles, started, strict=True)
            for number, process in enumerate(processes, start=1)
        }
        samples: list[Facts] = []
        began = time.monotonic()
        submitting = asyncio.create_task(self._submit())
        while (elapsed := time.monotonic() - began) < 60 * minutes and not submitting.done():
            await asyncio.sleep(SAMPLE_SECONDS - elapsed % SAMPLE_SECONDS)
            samples.append({"minute": len(samples) + 1, **await self._sample()})
            print(json.dumps(samples[-1]), flush=True)
        self._is_over = True
        await submitting
        await self._system.is_drained(timeout_seconds=END_SECONDS_MAX)
        await self._look_for_ended()
        return samples

    async def _submit(self) -> None:
        """
        Submit most tasks in batches, and ten per second individually to measure response times.
        """
        await asyncio.gather(self._submit_batches(), self._submit_singles())

    async def _submit_batches(self) -> None:
        size = round(self._per_second * STEP_SECONDS)
        began = time.monotonic()
        steps = 0
        while not self._is_over:
            tasks, starts = zip(*(_task(steps * size + n) for n in range(size)), strict=True)
            task_ids = await self._system.submit_batch(tasks)
            self.starts_wanted.update(zip(task_ids, starts, strict=True))
            steps += 1
            await asyncio.sleep(max(0.0, began + steps * STEP_SECONDS - time.monotonic()))

    async def _submit_singles(self) -> None:
        while not self._is_over:
            began = time.monotonic()
            task_id = await self._system.submit("work")
            self.post_seconds.append(time.monotonic() - began)
            self.starts_wanted[task_id] = 1
            await self._system.client.get(f"{self._system.url}/tasks/{task_id}")
            await asyncio.sleep(HTTP_PAUSE_SECONDS)

    async def _sample(self) -> Facts:
        await self._look_for_ended()
        [server] = await self._system.rows(SERVER)
        facts = {name: float(value) for name, value in server.items()}
        facts["accepted"], facts["completed"] = len(self.starts_wanted), len(self.completed)
        facts["post_p50_ms"] = 1_000 * statistics.median(self.post_seconds)
        facts["post_p99_ms"] = 1_000 * statistics.quantiles(self.post_seconds, n=100)[98]
        self.post_seconds.clear()
        for name, process in self._processes.items():
            # Captured logs are kept for tests, and would themselves grow.
            process.lines.clear()
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
            memory = sum(member.memory_info().rss for member in family)
            facts[f"{name}: mebibytes"] = memory / 1024**2
            facts[f"{name}: files"] = float(sum(member.num_fds() for member in family))
            facts[f"{name}: threads"] = float(sum(member.num_threads() for member in family))
        if self._broker is not None:
            overview = self._broker.api("GET", "overview")["object_totals"]
            [node] = self._broker.api("GET", "nodes")
            facts["rabbitmq: mebibytes"] = node["mem_used"] / 1024**2
            facts["rabbitmq: connections"] = float(overview["connections"])
            facts["rabbitmq: channels"] = float(overview["channels"])
        return {name: round(value, 2) for name, value in facts.items()}

    async def _look_for_ended(self) -> None:
        # Rows written late have an older timestamp, so the previous minute is read once more.
        since, self._looked_at = self._looked_at - SAMPLE_SECONDS, time.time()
        for row in await self._system.rows(ENDED, since):
            is_good = row["state"] == "completed"
            (self.completed if is_good else self.ended_otherwise).add(str(row["id"]))


def _task(number: int) -> tuple[Facts, int]:
    """
    A task of a repeating mix, and how often its handler will start.
    """
    kind = number % 100
    if kind < 3:
        return {"name": "flaky", "payload": {"failures": 1}}, 2
    if kind < 5:
        return {"name": "work", "payload": {}, "delay_seconds": 5}, 1
    if kind < 8:
        return {"name": "work-in-thread", "payload": {"seconds": 0.02}}, 1
    if kind < 9:
        return {"name": "work-in-process", "payload": {"seconds": 0.02}}, 1
    if kind < 15:
        return {"name": "work", "payload": {"seconds": 0.2}}, 1
    return {"name": "work", "payload": {}, "priority": number % 10}, 1


def _compared(samples: Sequence[Facts]) -> Facts:
    """
    For every sampled value: its median in the second quarter of the time and in the last, and its
    slope per hour since the first quarter.
    """
    quarter = len(samples) // 4
    if quarter < 2:
        return {}
    compared = {}
    for name in samples[0].keys() - {"minute", "accepted", "completed"}:
        values = [float(sample[name]) for sample in samples]
        hours = [sample["minute"] / 60 for sample in samples]
        slope = statistics.linear_regression(hours[quarter:], values[quarter:]).slope
        compared[name] = [
            round(statistics.median(values[quarter : 2 * quarter]), 2),
            round(statistics.median(values[-quarter:]), 2),
            round(slope, 2),
        ]
    return dict(sorted(compared.items()))


async def _perform(
    options: argparse.Namespace, database_url: str, broker: Broker | None, folder: Path
) -> Facts:
    async with System(
        database_url=database_url,
        broker_url=None if broker is None else broker.create_vhost(),
        folder=folder,
    ) as system:
        soak = Soak(system, broker, per_second=options.per_second)
        samples = await soak.run(options.minutes)
        starts = Counter(entry.task_id for entry in system.journal.entries(what="start"))
    wanted = soak.starts_wanted
    return {
        "minutes": options.minutes,
        "accepted": len(wanted),
        "completed": len(wanted.keys() & soak.completed),
        "failed": len(soak.ended_otherwise),
        "lost": len(wanted.keys() - soak.completed - soak.ended_otherwise),
        "begun": starts.total(),
        "begun_too_often": sum(starts[task_id] > often for task_id, often in wanted.items()),
        "begun_too_rarely": sum(starts[task_id] < often for task_id, often in wanted.items()),
        "second_quarter_last_quarter_slope_per_hour": _compared(samples),
    }


def main() -> int:
    """
    Start the servers, run the load, and print the results.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--per-second", type=int, default=150)
    parser.add_argument("--engine", choices=["postgres", "rabbitmq"], default="postgres")
    parser.add_argument("--rabbitmq", choices=rabbitmq.VERSIONS, default=rabbitmq.OLDEST)
    options = parser.parse_args()
    end_on_sigterm()
    data = scratch.make_folder("soak", in_memory=False)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(shutil.rmtree, data, ignore_errors=True)
        server = stack.enter_context(postgres.running_server("18", folder=data))
        broker = stack.enter_context(running_broker(options.engine, options.rabbitmq))
        versions = {"rabbitmq": broker.version} if broker else {}
        facts = asyncio.run(_perform(options, server.create_database(), broker, folder))
    print(json.dumps({**versions, **facts}), flush=True)
    wrong = ("failed", "lost", "begun_too_often", "begun_too_rarely")
    return 1 if any(facts[name] for name in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
