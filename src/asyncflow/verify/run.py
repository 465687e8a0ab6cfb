"""
One run from beginning to end: calm, faults, healing, draining, the verdict.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from asyncflow import __version__
from asyncflow.embedded import Cluster
from asyncflow.store.migrations import migrate
from asyncflow.verify import handlers, record
from asyncflow.verify.broker import Broker, OwnBroker, free_ports
from asyncflow.verify.client import Clients, Unanswered, request
from asyncflow.verify.fleet import HANDLERS, Fleet
from asyncflow.verify.history import History
from asyncflow.verify.nemesis import FAULTS, Nemesis, Stage, planned
from asyncflow.verify.proxy import Proxy
from asyncflow.verify.workload import Workload

LEASE_SECONDS, HEARTBEAT_SECONDS = 2.0, 0.4
GRACE_SECONDS = 2.0
STALL_SECONDS = 10.0
START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
UNTIL_LOCKS_TELL_SECONDS = 11.0
"""For so long after a start of PostgreSQL no worker is taken for dead."""

REST_SECONDS = (0.5, 2.5)


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What a run shall be.

    Attributes:
        folder: For everything it writes; must be empty or missing.
        seconds: How long faults happen.
        calm_seconds: How long none happens before.
        drain_seconds: How long everything may take to end afterwards.
        rate: Submissions per second.
        kinds: Faults to use; None is all that apply. None of them is named: no faults.
        mutant: A known bug to plant.
        engine: `postgres` or `rabbitmq`.
        broker_url, management_url: A broker to use; None starts one.
    """

    folder: Path
    seed: int
    seconds: float
    engine: str = "postgres"
    calm_seconds: float = UNTIL_LOCKS_TELL_SECONDS
    drain_seconds: float = 60.0
    rate: float = 100.0
    apis: int = 2
    workers: int = 3
    maintenances: int = 2
    kinds: Sequence[str] | None = None
    mutant: str | None = None
    broker_url: str | None = None
    management_url: str | None = None


async def run(plan: Plan) -> None:
    """
    Do it, and leave every history in the plan's folder for the checker.

    Raises:
        EmbeddedDatabaseError: No PostgreSQL can be started.
        NoBroker: No RabbitMQ can be used.
    """
    for name in ("logs", "history"):
        (plan.folder / name).mkdir(parents=True)
    [port] = free_ports(1)
    cluster = Cluster(plan.folder / "postgres", port=port, settings={"max_connections": "150"})
    broker = _broker(plan)
    history = History(plan.folder / "history", "nemesis")
    try:
        await asyncio.to_thread(cluster.start)
        started_at = time.monotonic()
        await migrate(cluster.url)
        await record.install(cluster.url)
        if broker is not None:
            await broker.start()
            await broker.make_vhost()
        await _perform(plan, cluster, broker, history, started_at=started_at)
        # What is in the folder is for reading; the servers' own files are not.
    finally:
        history.close()
        await asyncio.to_thread(cluster.stop)
        if broker is not None:
            await broker.close()
        for server in ("postgres", "rabbitmq"):
            log = next((plan.folder / server).glob("*.log"), None)
            if log is not None:
                shutil.copyfile(log, plan.folder / "logs" / f"{server}.txt")
            shutil.rmtree(plan.folder / server, ignore_errors=True)


async def _perform(
    plan: Plan, cluster: Cluster, broker: Broker | None, history: History, *, started_at: float
) -> None:
    fleet = await _fleet(plan, cluster, broker, history)
    ports = [int(member.environment["ASYNCFLOW_API_PORT"]) for member in fleet.of("api")]
    clients = Clients(
        ports,
        Workload(plan.seed),
        History(plan.folder / "history", "client"),
        seed=plan.seed,
        rate=plan.rate,
    )
    chance = random.Random(f"nemesis {plan.seed}")
    stage = Stage(fleet, cluster, broker, LEASE_SECONDS, GRACE_SECONDS)
    _write_plan(plan, broker)
    sampling = asyncio.create_task(_sample(history))
    try:
        fleet.start()
        await _until_ready(ports)
        submitting = asyncio.create_task(clients.run())
        history.write("phase", phase="calm")
        await asyncio.sleep(max(0.0, plan.calm_seconds - (time.monotonic() - started_at)))
        history.write("phase", phase="faults")
        nemesis = Nemesis(stage, history, chance=chance, rest=REST_SECONDS)
        if plan.kinds is None or plan.kinds:
            await nemesis.run(plan.kinds, seconds=plan.seconds)
        else:
            await asyncio.sleep(plan.seconds)
        history.write("phase", phase="healed")
        clients.stop()
        await submitting
        await _drain(plan, cluster, broker, history)
        history.write("phase", phase="stopping")
        await fleet.stop(grace_seconds=STOP_SECONDS_MAX)
    finally:
        sampling.cancel()
        await fleet.kill()
    await record.export(cluster.url, plan.folder / "history")


async def _fleet(plan: Plan, cluster: Cluster, broker: Broker | None, history: History) -> Fleet:
    fleet = Fleet(
        plan.folder,
        history,
        settings={
            "log_format": "json",
            "lease_seconds": LEASE_SECONDS,
            "heartbeat_seconds": HEARTBEAT_SECONDS,
            "shutdown_grace_seconds": GRACE_SECONDS,
            "cancel_grace_seconds": 0.5,
            "stall_seconds": STALL_SECONDS,
            "worker_concurrency": 16,
        },
        mutant=plan.mutant,
    )
    url = urlsplit(cluster.url)

    async def add(name: str, *arguments: str, **settings: object) -> None:
        wires = {"postgres": Proxy("127.0.0.1", url.port or 5432)}
        if broker is not None:
            wires["broker"] = Proxy(*broker.address)
        for wire in wires.values():
            await wire.start()
        login = url.netloc.rpartition("@")[0]
        mine = url._replace(netloc=f"{login}@127.0.0.1:{wires['postgres'].port}").geturl()
        if broker is not None:
            settings["broker_url"] = broker.url(port=wires["broker"].port)
        fleet.add(name, *arguments, wires=wires, database_url=mine, **settings)

    for number, port in enumerate(free_ports(plan.apis), 1):
        await add(f"api-{number}", "api", api_port=port)
    for number in range(1, plan.workers + 1):
        await add(f"worker-{number}", "worker", "--handlers", HANDLERS)
    for number in range(1, plan.maintenances + 1):
        await add(f"maintenance-{number}", "maintenance")
    return fleet


async def _until_ready(ports: Sequence[int]) -> None:
    async with asyncio.timeout(START_SECONDS_MAX):
        for port in ports:
            while True:
                try:
                    status, _ = await request(port, "GET", "/health/ready")
                    if status == 200:
                        break
                except Unanswered:
                    pass
                await asyncio.sleep(0.05)


async def _drain(plan: Plan, cluster: Cluster, broker: Broker | None, history: History) -> None:
    until = time.monotonic() + plan.drain_seconds
    left = await record.unfinished(cluster.url)
    while left and time.monotonic() < until:
        await asyncio.sleep(0.2)
        left = await record.unfinished(cluster.url)
    queues = [] if broker is None else await _empty_queues(broker, until)
    history.write("drained", unfinished=left, queues=queues)


async def _empty_queues(broker: Broker, until: float) -> list[dict[str, object]]:
    while True:
        queues = [
            {"name": q["name"], "messages": q.get("messages", 0)}
            for q in await broker.queues()
            if q["name"] != "asyncflow.unreadable"
        ]
        if not any(q["messages"] for q in queues) or time.monotonic() > until:
            return queues
        await asyncio.sleep(0.2)


async def _sample(history: History) -> None:
    """
    Once a second: both clocks, and how idle the machine is.
    """
    before = _cpu()
    while True:
        history.write("clock", wall_us=time.time_ns() // 1_000)
        await asyncio.sleep(1.0)
        now = _cpu()
        if before and now and now[1] > before[1]:
            idle = (now[0] - before[0]) / (now[1] - before[1])
            history.write("cpu", idle=round(idle, 3))
        before = now


def _cpu() -> tuple[int, int] | None:
    try:
        ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    return ticks[3] + ticks[4], sum(ticks)


def _broker(plan: Plan) -> Broker | None:
    if plan.engine == "postgres":
        return None
    if plan.broker_url is not None:
        host = urlsplit(plan.broker_url).hostname or "127.0.0.1"
        return Broker(plan.broker_url, plan.management_url or f"http://{host}:15672")
    return OwnBroker(plan.folder / "rabbitmq")


def _write_plan(plan: Plan, broker: Broker | None) -> None:
    chance = random.Random(0)
    kinds = [fault.kind for fault in planned(plan.kinds, broker=broker, chance=chance)]
    facts = {
        **{k: v for k, v in asdict(plan).items() if not k.endswith("_url")},
        "folder": str(plan.folder),
        "kinds": sorted(kinds),
        "all_kinds": sorted(FAULTS),
        "lease_seconds": LEASE_SECONDS,
        "heartbeat_seconds": HEARTBEAT_SECONDS,
        "backoff": [handlers.BACKOFF.base_seconds, handlers.BACKOFF.cap_seconds],
        "doomed_attempts": handlers.MAX_ATTEMPTS_OF_THE_DOOMED,
        "version": __version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    (plan.folder / "plan.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
