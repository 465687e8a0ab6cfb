"""
Throughput while another session holds a transaction open: vacuum cannot remove dead rows, so tables
and indexes only grow. The result is recorded in docs/internals/decisions.md ("What does a
transaction that stays open cost?").

    python -m bench.held_snapshot [--minutes 3] [--per-second 1000] [--engine rabbitmq]

One worker process runs on a dedicated PostgreSQL with stock settings. It gets the same load twice:
first undisturbed, then while a session sits idle in a REPEATABLE READ transaction. The load is a
steady rate of tasks, or with `--per-second 0` a backlog that never runs dry. Then a backlog of
`--drain` tasks is timed in the same state. Prints a line of JSON every ten seconds and one at the
end.
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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from asyncflow.domain.task import DEFAULT_TENANT_ID, NewTask, TaskIds
from asyncflow.embedded import Cluster
from asyncflow.store import submit
from asyncflow.store.database import Database
from asyncflow.store.migrations import migrate
from asyncflow.store.wakeups import send_wakeup
from bench.addresses import PROBE
from bench.by_hand import end_on_sigterm, running_broker
from bench.probe import Probe
from bench.processes import running
from tests.support import scratch

REPOSITORY = Path(__file__).parents[1]

SAMPLE_SECONDS = 10.0
STEP_SECONDS = 0.1
BATCH = 500
BACKLOG = 5_000
DRAIN_SECONDS_MAX = 600.0

LOOK = """
    SELECT (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'tasks_live') AS dead,
           pg_table_size('asyncflow.tasks_live') / 1024^2 AS table_mebibytes,
           pg_indexes_size('asyncflow.tasks_live') / 1024^2 AS index_mebibytes
"""


class Load:
    """
    Submits tasks and counts those that run.
    """

    def __init__(self, db: Database, probe: Probe) -> None:
        self.submitted = 0
        self._db = db
        self._probe = probe
        self._ids = TaskIds()

    @property
    def begun(self) -> int:
        """
        Number of tasks that have started to run.
        """
        return self._probe.calls()

    async def submit(self, count: int) -> None:
        """
        Submit `count` tasks that do nothing.
        """
        for begin in range(0, count, BATCH):
            size = min(BATCH, count - begin)
            await submit.submit(self._db, [self._new_task() for _ in range(size)])
            self.submitted += size
        await send_wakeup(self._db)

    async def keep_up(self, seconds: float, per_second: float) -> None:
        """
        Submit at this rate for `seconds`; a rate of 0 keeps a backlog that never runs dry.
        """
        began, before = time.perf_counter(), self.submitted
        while (elapsed := time.perf_counter() - began) < seconds:
            if per_second:
                wanted = int(elapsed * per_second) - (self.submitted - before)
            else:
                wanted = BACKLOG - (self.submitted - self.begun)
            if wanted > 0:
                await self.submit(wanted)
            await asyncio.sleep(STEP_SECONDS if per_second else 0.005)

    async def drain(self, count: int) -> float:
        """
        Tasks per second while a backlog of `count` is drained, plus what is left from before.
        """
        await self.submit(count)
        before, began = self.begun, time.perf_counter()
        while self.begun < self.submitted:
            if time.perf_counter() - began > DRAIN_SECONDS_MAX:
                break
            await asyncio.sleep(0.005)
        return (self.begun - before) / (time.perf_counter() - began)

    def _new_task(self) -> NewTask:
        return NewTask(self._ids.next(), DEFAULT_TENANT_ID, "bench-noop", "default", 4, "{}")


class Phase(NamedTuple):
    """
    The result of one phase.
    """

    per_second: list[float]
    drained_per_second: float


async def phase(name: str, load: Load, db: Database, options: argparse.Namespace) -> Phase:
    """
    Run minutes of load, with a sample every few seconds, then drain a backlog.
    """
    rates = []
    for _ in range(max(1, round(60 * options.minutes / SAMPLE_SECONDS))):
        began, before = time.perf_counter(), load.begun
        await load.keep_up(SAMPLE_SECONDS, options.per_second)
        rates.append((load.begun - before) / (time.perf_counter() - began))
        seen = {key: round(value) for key, value in (await db.fetch(LOOK))[0].items()}
        say(phase=name, per_second=round(rates[-1]), behind=load.submitted - load.begun, **seen)
    drained = await load.drain(options.drain)
    say(phase=name, drained_per_second=round(drained))
    return Phase(rates, drained)


@asynccontextmanager
async def snapshot(url: str) -> AsyncIterator[None]:
    """
    Hold a snapshot in a transaction that is idle until the end of the block.
    """
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read"):
            await connection.fetchval("SELECT count(*) FROM asyncflow.workers")
            yield
    finally:
        await connection.close()


async def measure(url: str, probe: Probe, options: argparse.Namespace) -> None:
    """
    Run both phases and compare the rates.
    """
    async with Database(url, size=4, timeout_seconds=300, name="bench") as db:
        load = Load(db, probe)
        await load.drain(options.drain)  # Warms up.
        calm = await phase("calm", load, db, options)
        async with snapshot(url):
            held = await phase("held", load, db, options)
    last = held.per_second[-max(1, len(held.per_second) // 3) :]
    say(
        calm_per_second=round(statistics.median(calm.per_second)),
        held_per_second_in_the_last_third=round(statistics.median(last)),
        kept=round(statistics.median(last) / statistics.median(calm.per_second), 3),
        calm_drain_per_second=round(calm.drained_per_second),
        held_drain_per_second=round(held.drained_per_second),
        drain_kept=round(held.drained_per_second / calm.drained_per_second, 3),
    )


def say(**facts: Any) -> None:
    """
    Print one line.
    """
    print(json.dumps(facts), flush=True)


def main() -> None:
    """
    Start the servers and a worker, measure, and stop them.
    """
    options = _options()
    end_on_sigterm()
    data = scratch.make_folder("bench", in_memory=False)
    with tempfile.TemporaryDirectory() as place, running_broker(options.engine) as broker:
        try:
            with Cluster(data, settings={"shared_buffers": "256MB"}) as cluster:
                asyncio.run(migrate(cluster.url))
                broker_url = broker.create_vhost() if broker else None
                _run(cluster.url, broker_url, Path(place), options)
        finally:
            shutil.rmtree(data, ignore_errors=True)


def _run(url: str, broker_url: str | None, place: Path, options: argparse.Namespace) -> None:
    probe, log = Probe(place / "probe"), place / "log"
    environment = {
        "ASYNCFLOW_DATABASE_URL": url,
        "ASYNCFLOW_BROKER_URL": broker_url or "",
        "ASYNCFLOW_LOG_FORMAT": "json",
        "ASYNCFLOW_LOG_LEVEL": "warning",
        "PYTHONPATH": str(REPOSITORY),
        PROBE: str(probe.file),
    }
    asyncflow = (sys.executable, "-m", "asyncflow")
    handlers = str(REPOSITORY / "bench" / "handlers.py")
    commands = [
        (*asyncflow, "worker", "--handlers", handlers, "--slots", options.slots),
        (*asyncflow, "maintenance"),
    ]
    with running(commands, environment=environment, log=log):
        asyncio.run(measure(url, probe, options))
    said = Counter(json.loads(line)["event"] for line in log.read_text().splitlines())
    say(warnings=said)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.held_snapshot")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each phase")
    parser.add_argument("--per-second", type=float, default=1_000.0, help="0: a backlog")
    parser.add_argument("--drain", type=int, default=20_000, help="the backlog at the end")
    parser.add_argument("--slots", default="100", help="slots of the worker")
    parser.add_argument("--engine", choices=["postgres", "rabbitmq"], default="postgres")
    return parser.parse_args()


if __name__ == "__main__":
    main()
