"""
An administrator takes things away while tasks run and then restores them: privileges, tables, the
schema, the role, its password, the statement timeout.

API, worker and maintenance run inside the test, each with its own pool, as if in separate
processes; otherwise the matrix of some seventy things would take an hour. `asyncflow verify` with
its fault `revoke` covers real processes.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableSequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from asyncflow.api.app import create_app
from asyncflow.api.catalogue import Catalogue
from asyncflow.handlers import Registry
from asyncflow.maintenance.chores import Chore, chores, run_chore
from asyncflow.relay import times as relay_times
from asyncflow.relay.relay import Relay
from asyncflow.settings import Settings
from asyncflow.store.database import Database, Executor
from asyncflow.store.wakeups import Waker
from asyncflow.transport import postgres
from asyncflow.transport.rabbitmq import transport as rabbitmq
from asyncflow.transport.rabbitmq.queue_backoff import BackoffTimes
from asyncflow.worker.times import Times
from tests.support.postgres import PostgresServer
from tests.support.roles import Administrator, administrator
from tests.support.running import Running, a_running_worker, registry_of

TABLES = (
    "tasks",
    "tasks_live",
    "tasks_finished",
    "attempts",
    "workers",
    "handlers",
    "queues",
    "probe",
    "tenants",
    "schema_version",
)
SOON = (0.01, 0.03)
"""Bounds of a wait, in seconds."""

BACKOFF = BackoffTimes(reconnect_seconds=SOON)
RIGHTS = ("SELECT", "INSERT", "UPDATE", "DELETE")
FUNCTIONS = (
    "pg_notify(text, text)",
    "pg_try_advisory_lock(bigint)",
    "pg_postmaster_start_time()",
    "now()",
)
CHARGED = """
    SELECT (SELECT count(*) FROM asyncflow.tasks WHERE failures > 0)
         + (SELECT count(*) FROM asyncflow.attempts WHERE outcome <> 'released')
"""
PATIENCE_SECONDS = 30.0
TIMEOUT_SECONDS = 1.0


@dataclass(frozen=True)
class Thing:
    """
    Something an administrator can take away.

    Attributes:
        take, give: SQL statements.
        ends_sessions: Open sessions are unaffected by what is taken, so they are terminated.
        refuses: Whether submissions must be refused meanwhile.
    """

    name: str
    take: str
    give: str
    ends_sessions: bool = False
    refuses: bool = False


def things() -> Iterator[Thing]:
    """
    Everything that can be taken away.
    """
    for table in TABLES:
        for right in RIGHTS:
            yield Thing(
                f"{right} on {table}",
                f"REVOKE {right} ON asyncflow.{table} FROM {{role}}",
                f"GRANT {right} ON asyncflow.{table} TO {{role}}",
                refuses=(right, table) == ("INSERT", "tasks"),
            )
        yield Thing(
            f"table {table}",
            f"ALTER TABLE asyncflow.{table} RENAME TO away",
            f"ALTER TABLE asyncflow.away RENAME TO {table}",
            refuses=table == "tasks",
        )
    for function in FUNCTIONS:
        yield Thing(
            f"EXECUTE on {function}",
            f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC",
            f"GRANT EXECUTE ON FUNCTION {function} TO PUBLIC",
        )
    for table in ("tasks", "workers"):
        yield Thing(
            f"rows of {table}",
            f"ALTER TABLE asyncflow.{table} ENABLE ROW LEVEL SECURITY",
            f"ALTER TABLE asyncflow.{table} DISABLE ROW LEVEL SECURITY",
            refuses=table == "tasks",
        )
    for table in ("tasks", "workers"):
        yield Thing(
            f"the peace of {table}, by somebody's trigger",
            f"""
            CREATE FUNCTION asyncflow.no() RETURNS trigger LANGUAGE plpgsql
            AS $$ BEGIN RAISE 'not today'; END $$;
            CREATE TRIGGER no BEFORE UPDATE ON asyncflow.{table}
            FOR EACH ROW EXECUTE FUNCTION asyncflow.no()
            """,
            "DROP FUNCTION asyncflow.no CASCADE",
        )
    yield Thing(
        "USAGE on the schema",
        "REVOKE USAGE ON SCHEMA asyncflow FROM {role}",
        "GRANT USAGE ON SCHEMA asyncflow TO {role}",
        refuses=True,
    )
    yield Thing(
        "the schema",
        "ALTER SCHEMA asyncflow RENAME TO away",
        "ALTER SCHEMA away RENAME TO asyncflow",
        refuses=True,
    )
    yield Thing(
        "the partition",
        "ALTER TABLE asyncflow.tasks DETACH PARTITION asyncflow.tasks_live",
        "ALTER TABLE asyncflow.tasks ATTACH PARTITION asyncflow.tasks_live"
        " FOR VALUES IN ('pending', 'queued', 'running')",
        refuses=True,
    )
    yield Thing(
        "CONNECT on the database",
        "REVOKE CONNECT ON DATABASE {database} FROM PUBLIC",
        "GRANT CONNECT ON DATABASE {database} TO PUBLIC",
        ends_sessions=True,
        refuses=True,
    )
    yield Thing(
        "the login",
        "ALTER ROLE {role} NOLOGIN",
        "ALTER ROLE {role} LOGIN",
        ends_sessions=True,
        refuses=True,
    )
    yield Thing(
        "the password",
        "ALTER ROLE {role} PASSWORD 'another'",
        "ALTER ROLE {role} PASSWORD 'secret'",
        ends_sessions=True,
        refuses=True,
    )
    for setting, value in (
        ("default_transaction_read_only", "on"),
        ("statement_timeout", "1ms"),
        ("idle_session_timeout", "50ms"),
        ("work_mem", "64kB"),
    ):
        yield Thing(
            setting,
            f"ALTER ROLE {{role}} SET {setting} = '{value}'",
            f"ALTER ROLE {{role}} RESET {setting}",
            ends_sessions=True,
            refuses=value == "on",
        )


class Maintenance:
    """
    The chores and, with a broker, the relay, at short intervals; counts the runs of each chore.
    """

    def __init__(self) -> None:
        self.turns: Counter[str] = Counter()
        self.duties: list[asyncio.Task[None]] = []

    def start(self, db: Database, broker_url: str | None) -> None:
        """
        Start all duties.
        """
        waker = Waker(db)
        for chore in chores(retention_days=30, has_broker=broker_url is not None):
            duty = run_chore(self._counted(chore), db, waker)
            self.duties.append(asyncio.create_task(duty))
        if broker_url is not None:
            relay = Relay(db, broker_url, times=relay_times.Times(poll=0.05, backoff=BACKOFF))
            self.duties.append(asyncio.create_task(relay.run()))

    def _counted(self, chore: Chore) -> Chore:
        async def run_once(db: Executor) -> int:
            try:
                return await chore.run_once(db)
            finally:
                self.turns[chore.name] += 1

        return replace(chore, run_once=run_once, period_seconds=0.03)

    async def stop(self) -> None:
        """
        Stop all duties.
        """
        for duty in self.duties:
            duty.cancel()
        await asyncio.gather(*self.duties, return_exceptions=True)


@dataclass
class House:
    """
    One API, worker and maintenance, with what they answered and logged.

    Attributes:
        answers: Number of answers by status, for requests of any kind.
        accepted: Ids of tasks that were answered 202.
    """

    client: httpx.AsyncClient
    worker: Running
    maintenance: Maintenance
    logs: MutableSequence[Any]
    answers: Counter[int] = field(default_factory=Counter)
    accepted: list[str] = field(default_factory=list)

    async def submit(self, name: str = "quick") -> int:
        """
        Submit one task; return the status of the answer.
        """
        response = await self.client.post("/tasks", json={"name": name})
        self.answers[response.status_code] += 1
        if response.status_code == 202:
            self.accepted.append(response.json()["id"])
        return response.status_code

    async def ask_everything(self) -> None:
        """
        Send one request of each other kind.
        """
        for method, path in (
            ("GET", "/tasks"),
            ("GET", f"/tasks/{self.accepted[0]}"),
            ("POST", f"/tasks/{self.accepted[0]}/redrive"),
            ("GET", "/health/ready"),
        ):
            response = await self.client.request(method, path)
            self.answers[response.status_code] += 1

    async def everybody_had_a_turn(self) -> None:
        """
        Wait until each chore has run and the worker has tried a heartbeat, each from start to
        finish.
        """
        turns, lines, held = Counter(self.maintenance.turns), len(self.logs), self.kept_at

        def had_a_turn() -> bool:
            beat = self.kept_at > held or any(
                line["event"] == "heartbeat.failed" for line in self.logs[lines:]
            )
            return beat and all(count > turns[c] + 1 for c, count in self.maintenance.turns.items())

        await until(had_a_turn)

    @property
    def kept_at(self) -> float:
        """
        Time at which the worker's leases were last known to hold.
        """
        return self.worker.worker._keeper._kept_at

    async def reaches(self, task_id: str, status: str) -> dict[str, Any]:
        """
        Wait until a task has this status.
        """
        task: dict[str, Any] = {}

        async def is_there() -> bool:
            nonlocal task
            response = await self.client.get(f"/tasks/{task_id}")
            task = response.json()
            return response.status_code == 200 and task["status"] == status

        await until(is_there)
        return task

    async def flows(self) -> None:
        """
        Wait until a submission is accepted again, and its task completed.
        """

        async def is_accepted() -> bool:
            return await self.submit() == 202

        await until(is_accepted)
        await self.reaches(self.accepted[-1], "COMPLETED")


async def until(condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """
    Poll until `condition` holds.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            holds = condition()
            if await holds if not isinstance(holds, bool) else holds:
                return
            await asyncio.sleep(0.01)


class Gate:
    """
    A handler that keeps running while things are taken away.
    """

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.open = asyncio.Event()
        self.runs = 0

    def registry(self) -> Registry:
        """
        A registry of this handler and one that returns immediately.
        """

        async def long() -> None:
            self.runs += 1
            self.entered.set()
            await self.open.wait()

        async def quick() -> None:
            pass

        return registry_of(quick, long, quick, max_attempts=1)


@asynccontextmanager
async def a_house(
    admin: Administrator, broker_url: str | None, registry: Registry
) -> AsyncIterator[House]:
    """
    Run API, worker and maintenance for one block.
    """
    async with AsyncExitStack() as stack:
        logs = stack.enter_context(capture_logs())
        of_api, of_worker, of_maintenance = [
            await stack.enter_async_context(
                Database(admin.url, size=4, timeout_seconds=TIMEOUT_SECONDS, name=name)
            )
            for name in ("api", "worker", "maintenance")
        ]
        maintenance = Maintenance()
        stack.push_async_callback(maintenance.stop)
        maintenance.start(of_maintenance, broker_url)
        worker = await stack.enter_async_context(
            a_running_worker(
                of_worker,
                registry=registry,
                heartbeat_seconds=0.05,
                lease_seconds=20.0,
                broker_url=broker_url,
                postgres_times=postgres.Times(poll=0.05, outage=SOON, listen=0.03),
                rabbitmq_times=rabbitmq.Times(outage=SOON, backoff=BACKOFF),
                times=Times(heartbeat_retry=0.03, settle_retry=SOON),
            )
        )
        catalogue = await stack.enter_async_context(Catalogue(of_api, refresh_seconds=0.05))
        waker = Waker(of_api)
        stack.push_async_callback(waker.close)
        settings = Settings(api_hosts=("api",))
        app = create_app(of_api, settings, catalogue=catalogue, waker=waker, version="1")
        transport = httpx.ASGITransport(app=app)
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://api")
        )
        yield House(client, worker, maintenance, logs)


async def take_and_give_back(thing: Thing, admin: Administrator, house: House) -> None:
    """
    Take one thing away, check the effects, and give it back.
    """
    before = await house.submit()
    await admin.execute(thing.take)
    try:
        if thing.ends_sessions:
            await admin.end_sessions()
        status = await house.submit()
        await house.ask_everything()
        await house.everybody_had_a_turn()
    finally:
        await admin.execute(thing.give)
        if thing.ends_sessions:
            await admin.end_sessions()
    await house.flows()

    assert 202 == before
    assert status == 503 if thing.refuses else status in (202, 503)


async def lock_and_let_go(table: str, admin: Administrator, house: House) -> None:
    """
    Lock a table, as another application's migration might, past the statement timeout.
    """
    await admin.execute(f"BEGIN; LOCK TABLE asyncflow.{table} IN ACCESS EXCLUSIVE MODE")
    try:
        status = await house.submit()
        await until(admin.waits_for_a_lock)
    finally:
        await admin.execute("COMMIT")
    await house.flows()

    assert status == (503 if table == "tasks" else 202)


async def drop_and_restore(admin: Administrator, server: PostgresServer, house: House) -> None:
    """
    Drop and restore table by table, as pg_restore does: for a moment there are tasks but no
    workers.
    """

    def run(program: str, *arguments: str) -> None:
        command = [str(server.program(program)), f"--dbname={admin.own_url}", *arguments]
        subprocess.run(command, check=True, capture_output=True)

    file = server.cluster.folder / f"{admin.database}.dump"
    await asyncio.to_thread(run, "pg_dump", "--format=custom", f"--file={file}", "-nasyncflow")
    await admin.execute("DROP SCHEMA asyncflow CASCADE")
    status = await house.submit()
    await house.everybody_had_a_turn()
    for section in ("pre-data", "data", "post-data"):
        await asyncio.to_thread(run, "pg_restore", f"--section={section}", str(file))
        await house.everybody_had_a_turn()
    file.unlink()
    await house.flows()

    assert 503 == status


async def test_what_is_taken_away_for_a_moment_costs_nobody_anything(
    postgres_server: PostgresServer, database_url: str
) -> None:
    """
    No process exits, the API answers 503 and never 500, no attempt is charged or restarted, and
    everything flows afterwards.
    """
    await go_through_the_matrix(postgres_server, database_url, broker_url=None)


@pytest.mark.needs_rabbitmq
@pytest.mark.oldest_postgres
async def test_nor_does_it_with_rabbitmq(
    postgres_server: PostgresServer, database_url: str, vhost_url: str
) -> None:
    """
    The same holds with RabbitMQ and on the oldest PostgreSQL.
    """
    await go_through_the_matrix(postgres_server, database_url, broker_url=vhost_url)


async def go_through_the_matrix(
    server: PostgresServer, database_url: str, *, broker_url: str | None
) -> None:
    """
    Take each thing away and give it back, one after another, while one task keeps running.
    """
    gate = Gate()
    async with (
        administrator(server, database_url) as admin,
        a_house(admin, broker_url, gate.registry()) as house,
    ):
        await admin.ask_for_password()
        await house.flows()
        await house.submit("long")
        [*_, long] = house.accepted
        async with asyncio.timeout(PATIENCE_SECONDS):
            await gate.entered.wait()

        for thing in things():
            try:
                await take_and_give_back(thing, admin, house)
            except (AssertionError, TimeoutError) as error:
                error.add_note(f"while {thing.name} was taken away; {house.logs[-10:]}")
                raise
        for table in ("tasks", "workers"):
            await lock_and_let_go(table, admin, house)
        for task_id in house.accepted:
            if task_id != long:
                await house.reaches(task_id, "COMPLETED")
        await drop_and_restore(admin, server, house)

        gate.open.set()
        task = await house.reaches(long, "COMPLETED")
        assert not house.worker.ended.done()
        assert not any(duty.done() for duty in house.maintenance.duties)
        events = Counter(line["event"] for line in house.logs)
        charged = await admin.count(CHARGED)

    assert (1, 1, 0) == (gate.runs, task["attempt"], charged)
    assert {503} == {status for status in house.answers if status >= 500}
    assert 0 == events["worker.lost"] + events["worker.fenced"] + events["request.failed"]
