"""
One run from beginning to end: calm, faults, healing, draining, verdict.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from asyncflow import __version__
from asyncflow.aio.background import Background
from asyncflow.embedded import Cluster
from asyncflow.store.migrations import migrate
from asyncflow.transport.rabbitmq.topology import unreadable
from asyncflow.verify import handlers, record
from asyncflow.verify.broker import Broker, OwnBroker, free_ports
from asyncflow.verify.client import Clients, Unanswered, request
from asyncflow.verify.faults import FAULTS, Stage
from asyncflow.verify.fleet import HANDLERS, Fleet
from asyncflow.verify.history import History
from asyncflow.verify.nemesis import Nemesis, planned
from asyncflow.verify.proxy import Proxy
from asyncflow.verify.role import make_role
from asyncflow.verify.workload import Workload

LEASE_SECONDS, HEARTBEAT_SECONDS = 2.0, 0.4
GRACE_SECONDS = 2.0
STALL_SECONDS = 10.0
SLOTS_MIN, SLOTS_PER_RATE = 16, 1 / 40
"""Slots grow with the rate, so that tasks which only wait do not become the limit."""

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
CALM_SECONDS = 2.0

REST_SECONDS = (0.5, 2.5)
# Little WAL to replay, so that an outage lasts as long as its fault.
SETTINGS = {"max_connections": "250", "max_wal_size": "256MB"}


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The parameters of a run.

    Attributes:
        folder: Receives everything the run writes; must be empty or missing.
        seconds: The duration of the faults.
        calm_seconds: The time before the first fault.
        drain_seconds: How long draining may go on without any unfinished task ending.
        rate: Tasks submitted per second.
        kinds: The faults to inject; None means all that apply, an empty sequence none.
        mutant: A known bug to run with.
        engine: `postgres` or `rabbitmq`.
        broker_url: The broker to use; None starts one.
        management_url: Its management plugin; None means port 15672 of the same host.
    """

    folder: Path
    seed: int
    seconds: float
    engine: str = "postgres"
    calm_seconds: float = CALM_SECONDS
    drain_seconds: float = 60.0
    rate: float = 100.0
    apis: int = 2
    workers: int = 3
    maintenances: int = 2
    kinds: Sequence[str] | None = None
    mutant: str | None = None
    broker_url: str | None = None
    management_url: str | None = None


async def run(plan: Plan, *, say: Callable[[str], None]) -> None:
    """
    Carry out a run, and leave its histories in the plan's folder for the checker.

    Args:
        say: Receives a line about each step, for the person who waits.

    Raises:
        EmbeddedDatabaseError: No PostgreSQL can be started.
        NoBroker: No RabbitMQ can be used.
    """
    for name in ("logs", "history"):
        (plan.folder / name).mkdir(parents=True)
    [port] = free_ports(1)
    cluster = Cluster(plan.folder / "postgres", port=port, settings=SETTINGS)
    broker = _broker(plan)
    history = History(plan.folder / "history", "nemesis")
    try:
        if broker is not None:
            await broker.open()
        await asyncio.to_thread(cluster.start)
        await migrate(cluster.url)
        await record.install(cluster.url)
        login = await make_role(cluster.url)
        await _perform(plan, cluster, broker, history, say, login)
    finally:
        history.close()
        await asyncio.to_thread(cluster.stop)
        if broker is not None:
            await broker.close()
        # The folder is for people; keep the servers' logs and remove their other files.
        for server in ("postgres", "rabbitmq"):
            log = next((plan.folder / server).glob("*.log"), None)
            if log is not None:
                shutil.copyfile(log, plan.folder / "logs" / f"{server}.txt")
            shutil.rmtree(plan.folder / server, ignore_errors=True)


async def _perform(
    plan: Plan,
    cluster: Cluster,
    broker: Broker | None,
    history: History,
    say: Callable[[str], None],
    login: str,
) -> None:
    fleet = await _fleet(plan, cluster, broker, history, login)
    ports = [int(member.environment["ASYNCFLOW_API_PORT"]) for member in fleet.of("api")]
    clients = Clients(
        ports,
        Workload(plan.seed, rate=plan.rate),
        History(plan.folder / "history", "client"),
        seed=plan.seed,
        rate=plan.rate,
    )
    chance = random.Random(f"nemesis {plan.seed}")
    stage = Stage(fleet, cluster, broker, LEASE_SECONDS, GRACE_SECONDS, STALL_SECONDS)
    _write_plan(plan, await _versions(cluster, broker), broker)
    sampling = Background(partial(_sample, history), name="sample")
    sampling.start()
    try:
        fleet.start()
        await _until_ready(ports)
        submitting = asyncio.create_task(clients.run())
        history.write("phase", phase="calm")
        await asyncio.sleep(plan.calm_seconds)
        history.write("phase", phase="faults")
        nemesis = Nemesis(stage, history, chance=chance, rest=REST_SECONDS, say=say)
        if plan.kinds is None or plan.kinds:
            await nemesis.run(plan.kinds, seconds=plan.seconds)
        else:
            await asyncio.sleep(plan.seconds)
        history.write("phase", phase="healed")
        say("No more faults; waiting for the remaining tasks.")
        clients.stop()
        await submitting
        await _drain(plan, cluster, broker, history)
        history.write("phase", phase="stopping")
        say("Stopping every process.")
        await fleet.stop(grace_seconds=STOP_SECONDS_MAX)
    finally:
        await sampling.stop()
        await fleet.kill()
    say("Checking the histories.")
    await record.export(cluster.url, plan.folder / "history")


async def _fleet(
    plan: Plan, cluster: Cluster, broker: Broker | None, history: History, login: str
) -> Fleet:
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
            "worker_slots": max(SLOTS_MIN, int(plan.rate * SLOTS_PER_RATE)),
        },
        mutant=plan.mutant,
        clocks=_clocks(plan, broker),
    )
    url = urlsplit(cluster.url)

    async def add(name: str, *arguments: str, **settings: object) -> None:
        wires = {"postgres": Proxy("127.0.0.1", url.port or 5432)}
        if broker is not None:
            wires["broker"] = Proxy(*broker.address)
        for wire in wires.values():
            await wire.start()
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


def _clocks(plan: Plan, broker: Broker | None) -> Path | None:
    if "clock-jump" not in _kinds(plan, broker):
        return None
    folder = plan.folder / "clocks"
    folder.mkdir()
    return folder


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
    left, since = await record.unfinished(cluster.url), time.monotonic()
    while left and time.monotonic() - since < plan.drain_seconds:
        await asyncio.sleep(0.2)
        now_left = await record.unfinished(cluster.url)
        if now_left < left:
            left, since = now_left, time.monotonic()
    until = time.monotonic() + plan.drain_seconds
    queues = [] if broker is None else await _empty_queues(broker, until)
    redelivered = 0 if broker is None else await broker.redelivered()
    history.write("drained", unfinished=left, queues=queues, redelivered=redelivered)


async def _empty_queues(broker: Broker, until: float) -> list[dict[str, object]]:
    while True:
        is_late = time.monotonic() > until
        try:
            queues = [
                {"name": q["name"], "messages": q.get("messages", 0)}
                for q in await broker.queues()
                if q["name"] != unreadable()
            ]
            if is_late or not any(q["messages"] for q in queues):
                return queues
        except OSError:
            if is_late:
                raise
        await asyncio.sleep(0.2)


async def _sample(history: History) -> None:
    """
    Record both clocks and the machine's idle time once a second.
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
        return Broker(plan.broker_url, plan.management_url)
    return OwnBroker(plan.folder / "rabbitmq")


async def _versions(cluster: Cluster, broker: Broker | None) -> dict[str, str]:
    connection = await asyncpg.connect(cluster.url)
    try:
        postgres = str(await connection.fetchval("SHOW server_version")).split()[0]
    finally:
        await connection.close()
    of_broker = {} if broker is None else {"rabbitmq": broker.version}
    ours = {"asyncflow": __version__, "python": platform.python_version()}
    return ours | {"postgresql": postgres} | of_broker


def _kinds(plan: Plan, broker: Broker | None) -> list[str]:
    chance = random.Random(0)
    return sorted(fault.kind for fault in planned(plan.kinds, broker=broker, chance=chance))


def _write_plan(plan: Plan, versions: dict[str, str], broker: Broker | None) -> None:
    facts = {
        **{k: v for k, v in asdict(plan).items() if not k.endswith("_url")},
        "folder": str(plan.folder),
        "kinds": _kinds(plan, broker),
        "all_kinds": sorted(FAULTS),
        "lease_seconds": LEASE_SECONDS,
        "heartbeat_seconds": HEARTBEAT_SECONDS,
        "backoff": [handlers.BACKOFF.base_seconds, handlers.BACKOFF.cap_seconds],
        "versions": versions,
        "cores": os.cpu_count(),
    }
    (plan.folder / "plan.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
