"""
The faults that a run can inject into processes, connections and servers.

A fault harms its target, heals it, and returns evidence that it took effect: the number of
connections reset, bytes held, sessions terminated, messages purged. A fault without any effect
proves nothing, and the checker calls a run that relies on it invalid.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
import psutil

from asyncflow.embedded import Cluster
from asyncflow.verify import role
from asyncflow.verify.broker import Broker, OwnBroker
from asyncflow.verify.fleet import Fleet, Member
from asyncflow.verify.process import STAND_STILL
from asyncflow.worker.lease import STALLED_EXIT_STATUS

TERMINATE_SECONDS_MAX = 20.0
STALL_SECONDS_MAX = 10.0
UP_SECONDS_MAX = 30.0
POLL_SECONDS = 0.02
SEEN_TRIES_MAX = 10
HINTS_WAIT_SECONDS = 1.5
JUMP_SECONDS = (60.0, 600.0)
READING_SECONDS_MAX = 5.0
LOSING_SECONDS = 1.0
NOTICED_SECONDS = 12.0
"""Longer than the default time limit of a statement."""

DENIED = b"permission denied"


@dataclass(frozen=True, slots=True)
class Stage:
    """
    What faults can act on.

    Attributes:
        lease_seconds: How long a worker's leases last without a heartbeat.
        grace_seconds: How long a process may take to stop when asked.
        stall_seconds: How long a worker's event loop may be blocked.
    """

    fleet: Fleet
    cluster: Cluster
    broker: Broker | None
    lease_seconds: float
    grace_seconds: float
    stall_seconds: float


@dataclass(frozen=True, slots=True)
class Bite:
    """
    The effect of a fault; a `count` of 0 means that it had none.
    """

    count: int
    detail: str


Harm = Callable[[Stage, Member, random.Random], Awaitable[Bite]]


@dataclass(frozen=True, slots=True)
class Fault:
    """
    A kind of fault.

    Attributes:
        roles: The processes it may hit; empty if it hits a server.
        needs: `broker`, `own-broker`, or an empty string for neither.
    """

    kind: str
    harm: Harm
    roles: tuple[str, ...] = ()
    needs: str = ""

    @property
    def server(self) -> str:
        """
        The server it hits; empty if it hits a process.
        """
        if self.roles:
            return ""
        return "broker" if self.needs else "postgres"


FAULTS: dict[str, Fault] = {}


def _fault(kind: str, *roles: str, needs: str = "") -> Callable[[Harm], Harm]:
    def declare(harm: Harm) -> Harm:
        FAULTS[kind] = Fault(kind, harm, roles, needs)
        return harm

    return declare


# On processes


@_fault("kill", "worker", "api", "maintenance")
async def kill(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    SIGKILL; the fleet starts another process.
    """
    process = await _running(victim)
    victim.asked = True
    process.send_signal(signal.SIGKILL)
    status = await process.wait()
    await _replaced(victim, process)
    return Bite(int(status == -signal.SIGKILL), f"pid {process.pid} ended by signal {-status}")


@_fault("kill-worker", "worker")
async def kill_worker(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    SIGKILL of a worker that holds leases.
    """
    await _up(victim)
    return await kill(stage, victim, chance)


@_fault("pause", "worker")
async def pause(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    SIGSTOP for longer than the lease, then SIGCONT: a zombie that believes it holds leases.
    """
    process = await _up(victim)
    process.send_signal(signal.SIGSTOP)
    try:
        await _is_stopped(process.pid)
        await asyncio.sleep(stage.lease_seconds + chance.uniform(1.5, 2.5))
    finally:
        victim.send(signal.SIGCONT)
    return Bite(1, f"pid {process.pid} was frozen")


@_fault("pause-briefly", "worker", "api", "maintenance")
async def pause_briefly(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    SIGSTOP for less than the lease.
    """
    process = await _running(victim)
    process.send_signal(signal.SIGSTOP)
    try:
        await _is_stopped(process.pid)
        await asyncio.sleep(stage.lease_seconds * chance.uniform(0.2, 0.5))
    finally:
        victim.send(signal.SIGCONT)
    return Bite(1, f"pid {process.pid} was frozen for a moment")


@_fault("terminate", "worker", "api", "maintenance")
async def terminate(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    SIGTERM, as a rolling restart does.
    """
    process = await _up(victim)
    victim.asked = True
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(stage.grace_seconds + TERMINATE_SECONDS_MAX):
        status = await process.wait()
    await _replaced(victim, process)
    return Bite(1, f"pid {process.pid} ended with {status}")


@_fault("stall", "worker")
async def stall(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    Its event loop blocks forever, while its heartbeats keep its leases.
    """
    process = await _registered(stage, victim)
    victim.asked = True
    process.send_signal(STAND_STILL)
    async with asyncio.timeout(stage.stall_seconds + STALL_SECONDS_MAX):
        status = await process.wait()
    await _replaced(victim, process)
    return Bite(int(status == STALLED_EXIT_STATUS), f"pid {process.pid} ended itself: {status}")


@_fault("clock-jump", "worker", "api")
async def clock_jump(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    Its wall clock jumps some minutes forward or back, and returns after more than a lease.
    """
    clock = victim.clock
    assert clock is not None
    seconds = chance.choice((-1, 1)) * chance.uniform(*JUMP_SECONDS)
    before = clock.readings
    clock.set(seconds)
    try:
        await asyncio.sleep(stage.lease_seconds + chance.uniform(1, 3))
        count, wrong_by = clock.readings - before, clock.shown_seconds - time.time()
    finally:
        clock.set(0)
    is_so = abs(wrong_by - seconds) < READING_SECONDS_MAX
    return Bite(count * is_so, f"{count} readings, the last {wrong_by:+.1f} s off")


# On wires


@_fault("reset-postgres", "worker", "api", "maintenance")
async def reset_postgres(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    All its connections to PostgreSQL are reset, a few times.
    """
    return await _reset(victim, "postgres", chance)


@_fault("hold-postgres", "worker", "api", "maintenance")
async def hold_postgres(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    Traffic between it and PostgreSQL is held for longer than the lease, then delivered or dropped.
    """
    return await _hold(victim, "postgres", stage.lease_seconds + 2, chance)


@_fault("cut-off", "worker")
async def cut_off(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    A worker is cut off from PostgreSQL until its leases are lost; then what it sent arrives late.
    """
    return await _hold(victim, "postgres", stage.lease_seconds + 3, None)


@_fault("lose-requests", "worker", "api", "maintenance")
async def lose_requests(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    Its next request on each connection to PostgreSQL is lost, and the connection breaks.
    """
    return await _lose(victim, answers=False)


@_fault("lose-answers", "worker", "api", "maintenance")
async def lose_answers(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    PostgreSQL carries out its next requests; the answers are lost with the connections.
    """
    return await _lose(victim, answers=True)


@_fault("forget", "worker", "api", "maintenance")
async def forget(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    A firewall forgets its open connections to PostgreSQL: what is sent over them is silently
    dropped. New connections work.
    """
    await _up(victim)
    proxy = victim.wires["postgres"]
    before, count = proxy.forgotten_bytes, proxy.forget()
    await asyncio.sleep(NOTICED_SECONDS)
    sent = proxy.forgotten_bytes - before
    return Bite(sent, f"{sent} bytes over {count} connections to postgres were dropped")


@_fault("reset-broker", "worker", "maintenance", needs="broker")
async def reset_broker(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    Its connections to RabbitMQ are reset.
    """
    return await _reset(victim, "broker", chance)


@_fault("hold-broker", "worker", "maintenance", needs="broker")
async def hold_broker(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    Traffic between it and RabbitMQ is held for a while.
    """
    return await _hold(victim, "broker", stage.lease_seconds + 2, chance)


# On PostgreSQL


@_fault("postgres-crash")
async def postgres_crash(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    An immediate stop, which amounts to a crash with recovery, and a start.
    """
    before = stage.cluster.pid
    await asyncio.to_thread(stage.cluster.stop, "immediate")
    await asyncio.sleep(chance.uniform(0.1, 1.5))
    await asyncio.to_thread(stage.cluster.start)
    return Bite(int(before != stage.cluster.pid), f"server {before} is now {stage.cluster.pid}")


@_fault("terminate-backends")
async def terminate_backends(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    pg_terminate_backend on every session, a few times.
    """
    count = 0
    connection = await asyncpg.connect(stage.cluster.url)
    try:
        for _ in range(3):
            count += await connection.fetchval(
                """
                SELECT count(pg_terminate_backend(pid))
                  FROM pg_stat_activity
                 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
                """
            )
            await asyncio.sleep(chance.uniform(0.1, 0.5))
    finally:
        await connection.close()
    return Bite(count, f"{count} sessions terminated")


@_fault("revoke")
async def revoke(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    A privilege is revoked from the role of all processes and granted again, before or after their
    leases end.
    """
    log = stage.cluster.log_file
    right = chance.choice(role.RIGHTS)
    before = log.read_bytes().count(DENIED)
    await role.take_away(stage.cluster.url, right)
    try:
        await asyncio.sleep(stage.lease_seconds * chance.uniform(0.3, 1.5))
    finally:
        await role.give_back(stage.cluster.url)
    refused = log.read_bytes().count(DENIED) - before
    return Bite(refused, f"without {right} {refused} statements were refused")


# On RabbitMQ


@_fault("broker-restart", needs="own-broker")
async def broker_restart(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    RabbitMQ stops gracefully and starts again.
    """
    broker = _own(stage)
    try:
        await broker.stop()
        was_down = not await broker.answers()
        await asyncio.sleep(chance.uniform(0, 2))
    finally:
        await broker.start()
    return Bite(int(was_down), "stopped and started")


@_fault("broker-kill", needs="own-broker")
async def broker_kill(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    RabbitMQ is killed and starts again.
    """
    broker = _own(stage)
    await broker.kill()
    was_down = not await broker.answers()
    await broker.start()
    return Bite(int(was_down), "killed and started")


@_fault("broker-alarm", needs="own-broker")
async def broker_alarm(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    RabbitMQ accepts no messages for a while.
    """
    broker = _own(stage)
    try:
        await broker.alarm(on=True)
        await asyncio.sleep(chance.uniform(2, 5))
        was_raised = await _has_alarm(broker)
    finally:
        await broker.alarm(on=False)
    return Bite(int(was_raised), "a memory alarm came and went")


@_fault("broker-purge", needs="broker")
async def broker_purge(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    All waiting hints are purged.
    """
    assert stage.broker is not None
    async with _hints_waiting(stage):
        count = await stage.broker.purge()
    return Bite(count, f"{count} messages purged")


@_fault("broker-delete-queues", needs="broker")
async def broker_delete_queues(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    Every queue is deleted with its hints.
    """
    assert stage.broker is not None
    async with _hints_waiting(stage):
        count = await stage.broker.delete_queues()
    return Bite(count, f"{count} messages deleted with their queues")


@_fault("broker-erase", needs="broker")
async def broker_erase(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    The virtual host is deleted with all queues, hints and connections, and recreated.
    """
    assert stage.broker is not None
    async with _hints_waiting(stage):
        count = await stage.broker.ready()
        await stage.broker.make_vhost()
    return Bite(count, f"{count} messages erased")


@_fault("broker-wipe", needs="own-broker")
async def broker_wipe(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    RabbitMQ is killed, and starts again without its data.
    """
    broker = _own(stage)
    async with _hints_waiting(stage):
        count = await broker.ready()
        await broker.wipe()
    return Bite(count, f"{count} messages lost with the disk")


@_fault("broker-close-connections", needs="broker")
async def broker_close_connections(stage: Stage, victim: Member, chance: random.Random) -> Bite:
    """
    RabbitMQ closes every connection.
    """
    assert stage.broker is not None
    count = 0
    for _ in range(SEEN_TRIES_MAX):
        # The management plugin shows a new connection only after some seconds.
        count = await stage.broker.close_connections()
        if count:
            break
        await asyncio.sleep(1)
    return Bite(count, f"{count} connections closed")


async def _running(victim: Member) -> asyncio.subprocess.Process:
    while True:
        if victim.process is not None and victim.is_running:
            return victim.process
        await asyncio.sleep(POLL_SECONDS)


async def _up(victim: Member, wire: str = "postgres") -> asyncio.subprocess.Process:
    """
    The process, once it is connected to the server: it handles signals and may hold leases.
    """
    async with asyncio.timeout(UP_SECONDS_MAX):
        while True:
            process = await _running(victim)
            if victim.wires[wire].connections:
                return process
            await asyncio.sleep(POLL_SECONDS)


REGISTERED = """
    SELECT
      FROM asyncflow.workers w
     WHERE w.name LIKE $1
       AND w.stopped_at IS NULL
       AND w.lost_at IS NULL
"""


async def _registered(stage: Stage, victim: Member) -> asyncio.subprocess.Process:
    """
    A worker, once its lease thread runs, which also watches the event loop.
    """
    async with asyncio.timeout(UP_SECONDS_MAX):
        while True:
            process = await _up(victim)
            with contextlib.suppress(asyncpg.PostgresError, OSError):
                connection = await asyncpg.connect(stage.cluster.url)
                try:
                    if await connection.fetchrow(REGISTERED, f"%:{process.pid}") is not None:
                        return process
                finally:
                    connection.terminate()
            await asyncio.sleep(POLL_SECONDS)


async def _replaced(victim: Member, former: asyncio.subprocess.Process) -> None:
    while True:
        if victim.process is not former:
            return
        await asyncio.sleep(POLL_SECONDS)


async def _is_stopped(pid: int) -> None:
    while True:
        if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
            return
        await asyncio.sleep(POLL_SECONDS)


async def _has_alarm(broker: OwnBroker) -> bool:
    for _ in range(SEEN_TRIES_MAX):
        if await broker.has_alarm():
            return True
        await asyncio.sleep(1)
    return False


async def _reset(victim: Member, wire: str, chance: random.Random) -> Bite:
    await _up(victim, wire)
    count = 0
    for _ in range(chance.randint(1, 4)):
        count += victim.wires[wire].reset()
        await asyncio.sleep(chance.uniform(0.05, 0.6))
    return Bite(count, f"{count} connections to {wire} reset")


async def _hold(victim: Member, wire: str, seconds: float, chance: random.Random | None) -> Bite:
    await _up(victim, wire)
    proxy = victim.wires[wire]
    before = proxy.held_bytes
    proxy.hold()
    await asyncio.sleep(seconds)
    held = proxy.held_bytes - before
    how = "delivered late"
    if chance is not None and chance.random() < 0.5:
        proxy.reset()
        how = "never delivered"
    proxy.release()
    return Bite(held, f"{held} bytes to and from {wire} {how}")


async def _lose(victim: Member, *, answers: bool) -> Bite:
    await _up(victim)
    proxy = victim.wires["postgres"]
    before = proxy.lost_bytes
    proxy.lose(answers=answers)
    await asyncio.sleep(LOSING_SECONDS)
    proxy.lose_no_more()
    lost = proxy.lost_bytes - before
    return Bite(lost, f"{lost} bytes {'from' if answers else 'to'} postgres lost")


@asynccontextmanager
async def _hints_waiting(stage: Stage) -> AsyncIterator[None]:
    """
    Cut the workers off from RabbitMQ, so that hints are waiting there.
    """
    assert stage.broker is not None
    wires = [worker.wires["broker"] for worker in stage.fleet.of("worker")]
    for wire in wires:
        wire.hold()
    try:
        await asyncio.sleep(HINTS_WAIT_SECONDS)
        for _ in range(SEEN_TRIES_MAX):
            # Prefetched hints are still being sent to the workers.
            if await stage.broker.ready():
                break
            await asyncio.sleep(1)
        yield
    finally:
        for wire in wires:
            wire.release()


def _own(stage: Stage) -> OwnBroker:
    assert isinstance(stage.broker, OwnBroker)
    return stage.broker
