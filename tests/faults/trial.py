"""
One case from its servers to its verdict: real processes, one of which fails at one point.

The rest of the deployment is healthy and behaves as usual: a process that exited is restarted, a
client without an answer retries. A frozen process resumes once others have done its work, so that
it acts on what it knew before it lost its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil

from asyncflow.store.database import Database, Record
from asyncflow.store.wakeups import send_wakeup
from asyncflow.transport.amqp import connect
from asyncflow.transport.rabbitmq.topology import broker_queue
from tests.faults.cases import GONE, Case
from tests.faults.failpoints import FAILPOINTS
from tests.faults.finding import Facts, Finding, Row, judge
from tests.faults.stories import STORIES, just_now
from tests.support import builders
from tests.support.broker import Broker
from tests.support.ports import free_port
from tests.support.postgres import PostgresServer
from tests.support.process import Process
from tests.support.system import System
from tests.support.wire import Desk, Wire, laid

# Leases hold even if a worker gets little CPU: other cases and other programs run too.
SETTINGS = {
    "worker_handlers": "tests.faults.handlers",
    "worker_queues": builders.QUEUE,
    "heartbeat_seconds": 2,
    "lease_seconds": 30,
    "shutdown_grace_seconds": 5,
    "cancel_grace_seconds": 1,
}

SLEEPER_SETTINGS = {"lease_seconds": 10}
"""Settings of a frozen process: it sleeps past its lease, and must notice that on waking up."""

BITE_SECONDS = 60.0
"""How long a process may take to reach its failpoint, including startup."""

STEP_SECONDS = 60.0
"""How long any other step of a case may take."""

CASE_SECONDS = 240.0
POLL_SECONDS = 0.05
KILLED = -signal.SIGKILL

BYSTANDERS = {
    "api": ("worker", "maintenance"),
    "worker": ("maintenance",),
    "maintenance": ("worker",),
}
"""The other processes that a task needs to finish, by the role of the process that fails."""


@dataclass(frozen=True, slots=True)
class Ground:
    """
    What the cases of one engine share. Each case has its own database and virtual host.
    """

    postgres: PostgresServer
    broker: Broker | None
    folder: Path


async def perform(case: Case, ground: Ground, *, bite_seconds: float = BITE_SECONDS) -> Finding:
    """
    Run a case on the running servers, and clean up after it.
    """
    folder = ground.folder / case.name
    folder.mkdir()
    database_url = await asyncio.to_thread(ground.postgres.create_database)
    urls = {"postgres": database_url}
    if ground.broker is not None:
        urls["broker"] = await asyncio.to_thread(ground.broker.create_vhost)
    try:
        async with (
            System(
                database_url=database_url,
                broker_url=urls.get("broker"),
                folder=folder,
                **SETTINGS,
            ) as system,
            Database(database_url, size=2, timeout_seconds=STEP_SECONDS) as db,
            laid(urls) as wires,
            Desk(wires).open() as desk,
        ):
            trial = Trial(case, system, db, wires, desk, bite_seconds=bite_seconds)
            faults = judge(case, await trial.run())
            words = [f"{name}:\n{tail}" for name, tail in system.tails()] if faults else []
            return Finding(case, trial.facts, faults, "\n".join(words))
    finally:
        await asyncio.to_thread(ground.postgres.drop_database, database_url)
        if ground.broker is not None:
            await asyncio.to_thread(ground.broker.drop_vhost, urls["broker"])


class Trial:
    """
    One run of a case.

    Attributes:
        facts: What has been observed so far.
        victim: The process that fails.
        client: A request in flight, if the story has one.
    """

    victim: Process

    def __init__(
        self,
        case: Case,
        system: System,
        db: Database,
        wires: Mapping[str, Wire],
        desk: Desk,
        *,
        bite_seconds: float,
    ) -> None:
        self.point = FAILPOINTS[case.point]
        self.facts = Facts()
        self.db = db
        self.client: asyncio.Task[None] | None = None
        self._case = case
        self._role = "worker" if self.point.role == "child" else self.point.role
        self._story = STORIES[self.point.story]
        self._system = system
        self._wires = wires
        self._desk = desk
        self._bite_seconds = bite_seconds
        self._fired_file = system.folder / "fired"
        self._api_urls: list[str] = []
        self._replacement: Process | None = None
        self._replacing: asyncio.Task[None] | None = None
        self._later_tasks: list[UUID] = []

    @property
    def accepted(self) -> list[UUID]:
        """
        The accepted tasks; see `Facts`.
        """
        return self.facts.accepted

    async def run(self) -> Facts:
        """
        Run the case to its end. Whatever keeps it from getting there is recorded as a fact too.
        """
        try:
            async with asyncio.timeout(CASE_SECONDS):
                await self._run()
        except AssertionError as error:
            self.facts.trouble = str(error) or traceback.format_exc()
        except Exception:
            self.facts.trouble = traceback.format_exc()
        finally:
            for task in (self.client, self._replacing):
                if task is not None:
                    task.cancel()
                    await asyncio.wait([task])
        return self.facts

    async def _run(self) -> None:
        await self._story.prepare(self)
        bystanders = [self._start(role) for role in BYSTANDERS[self._role]]
        self.victim, *_ = await asyncio.gather(self._start_victim(), *bystanders)
        await self._story.provoke(self)
        failed_at = await self._fires()
        await self._others_react()
        if self._role == "api":
            await self._a_later_task_is_done()
            if self._case.action == "freeze":
                # Only the process itself can answer the request it was sent.
                self.victim.send(signal.SIGCONT)
                failed_at = time.monotonic()
        await self._all_is_done()
        self.facts.seconds = time.monotonic() - failed_at
        if self._role != "api":
            if self._case.action == "freeze":
                await self._victim_wakes_late()
            await self._a_later_task_is_done()
        await self._all_leave()
        await self._look_around()

    # The processes

    async def _start_victim(self) -> Process:
        system = self._system
        given: dict[str, object] = {
            **system.settings,
            **(SLEEPER_SETTINGS if self._case.action == "freeze" else {}),
            **self._story.settings,
            "database_url": self._wires["postgres"].url,
            "test_fired": self._fired_file,
            "test_control": self._desk.port,
        }
        if "broker" in self._wires:
            given["broker_url"] = self._wires["broker"].url
        victim = await Process.start(
            f"victim-{self._role}",
            *_command(self._role),
            settings=given,
            folder=system.folder,
            program=("tests.faults.process", self._case.point, self._case.action),
        )
        system.processes.append(victim)
        if self._role == "api":
            await self._is_ready(victim)
        return victim

    async def _start(self, role: str, **settings: Any) -> Process:
        process = await self._system.run(*_command(role), **settings)
        await self._is_ready(process)
        return process

    async def _is_ready(self, process: Process) -> None:
        line = await process.log_event("process.started", timeout_seconds=STEP_SECONDS)
        if "url" in line:
            self._api_urls.append(line["url"])

    async def _others_react(self) -> None:
        """
        Act as a supervisor: replace a process that exited or stopped responding.
        """
        if self._case.action == "freeze":
            await self._until(self._is_frozen, "the process stands still")
            self.facts.victim = "was frozen"
            await self._replace()
        elif self._case.action == "exit" and self.point.role != "child":
            status = await self.victim.exit_status()
            assert status == KILLED, f"the process was not killed, it ended with {status}"
            self.facts.victim = "was killed"
            await self._replace()
        else:
            self._replacing = asyncio.create_task(self._replace_when_it_ends())

    async def _replace_when_it_ends(self) -> None:
        status = await self.victim.exit_status(timeout_seconds=CASE_SECONDS)
        self.facts.victim = f"ended with {status}"
        if self._story is STORIES["shutdown"]:
            self.facts.statuses[self.victim.name] = status
        await self._replace()

    async def _replace(self) -> None:
        self._replacement = await self._start(self._role, **self._story.settings)

    async def _is_frozen(self) -> bool:
        return psutil.Process(self.victim.pid).status() == psutil.STATUS_STOPPED

    async def _victim_wakes_late(self) -> None:
        """
        Resume the process in the middle of its step, once others have done its work.
        """
        if self._role == "worker":
            await self._until(self._is_given_up, "the frozen worker is given up")
            self.victim.send(signal.SIGCONT)
            await self._until(self._came_back, "the frozen worker comes back or ends")
        else:
            # Later work has to be done by the process that was frozen.
            assert self._replacement is not None
            await self._leaves(self._replacement)
            self.victim.send(signal.SIGCONT)

    async def _is_given_up(self) -> bool:
        lost = "SELECT FROM asyncflow.workers WHERE lost_at IS NOT NULL"
        return bool(await self.db.fetch(lost))

    async def _came_back(self) -> bool:
        starts = [line for line in self.victim.lines if line["event"] == "process.started"]
        return len(starts) > 1 or not self.victim.is_running

    async def _all_leave(self) -> None:
        """
        Stop every process gracefully, maintenance once no worker is left alive.
        """
        if self.client is not None:
            async with asyncio.timeout(STEP_SECONDS):
                await self.client
        if self._replacing is not None:
            if self.victim.is_running:
                self._replacing.cancel()
            else:
                await self._replacing
        running = [process for process in self._system.processes if process.is_running]
        last = [process for process in running if "maintenance" in process.name]
        await asyncio.gather(*(self._leaves(process) for process in running if process not in last))
        # A killed worker is declared dead, and so is one that could not sign off.
        await self._until(self._has_no_worker, "every worker is known to have ended")
        await asyncio.gather(*(self._leaves(process) for process in last))

    async def _has_no_worker(self) -> bool:
        alive = "SELECT FROM asyncflow.workers WHERE stopped_at IS NULL AND lost_at IS NULL"
        return not await self.db.fetch(alive)

    async def _leaves(self, process: Process) -> None:
        process.send(signal.SIGTERM)
        status = await process.exit_status(timeout_seconds=STEP_SECONDS)
        self.facts.statuses[process.name] = status

    # What is waited for

    async def handler_starts(self) -> None:
        """
        Wait until the task's handler has begun.
        """
        task_id = str(self.accepted[0])
        await self._system.journal.wait_for("start", task_id, timeout_seconds=STEP_SECONDS)

    async def _fires(self) -> float:
        """
        Wait until the failpoint has fired; return the time at which it did.
        """

        async def has_said_so() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return self._fired_file.read_text().endswith("\n")
            return False

        await self._until(has_said_so, "the failpoint fires", seconds=self._bite_seconds)
        self.facts.fired = True
        return float(self._fired_file.read_text().split()[0])

    async def _all_is_done(self) -> None:
        """
        Wait until every task, including those stored but never answered, has its expected state.
        """

        async def is_done() -> bool:
            rows = await self._rows()
            if self._case.state == GONE:
                return not rows
            states = {row["state"] for row in rows}
            return bool(self.accepted) and states == {self._case.state}

        try:
            await self._until(is_done, "all is done", seconds=self._case.seconds)
        except AssertionError as error:
            rows = [f"{row['id']} {row['state']}" for row in await self._rows()]
            raise AssertionError(f"{error}; accepted: {self.accepted}, there: {rows}") from None

    async def _a_later_task_is_done(self) -> None:
        """
        Check that nothing is stuck: a new task is done, by the process that failed if possible.
        """
        state = "completed"
        if self._role == "api":
            self._later_tasks.append(await self._submit_until_accepted("step-in-loop"))
        elif self._role == "maintenance" and self._case.engine == "postgres":
            state = "cancelled"
            await self._store_later_task(expires_at=just_now())
        else:
            await self._store_later_task()
            await send_wakeup(self.db)

        async def is_done() -> bool:
            query = "SELECT state FROM asyncflow.tasks WHERE id = ANY ($1)"
            self.facts.afterwards = await self.db.fetchval(query, self._later_tasks), state
            return self.facts.afterwards == (state, state)

        await self._until(is_done, f"a task that comes later is {state}")

    async def _store_later_task(self, **fields: Any) -> None:
        self._later_tasks += await builders.submitted(
            self.db, 1, name="step-in-loop", payload="{}", **fields
        )

    async def _until(
        self,
        condition: Callable[[], Awaitable[object]],
        expectation: str,
        *,
        seconds: float = STEP_SECONDS,
    ) -> None:
        await self._system.until(condition, expectation, timeout_seconds=seconds)

    # HTTP

    async def submit_until_accepted(self) -> None:
        """
        Submit the task of this case, retrying until it is answered 202.
        """
        self.accepted.append(await self._submit_until_accepted(self.point.handler))

    async def _submit_until_accepted(self, name: str) -> UUID:
        while True:
            response = await self._post("/tasks", {"name": name, "payload": {}})
            if response is not None and response.status_code == 202:
                return UUID(response.json()["id"])
            await asyncio.sleep(POLL_SECONDS)

    async def post(self, path: str) -> None:
        """
        Send one request, whatever the answer.
        """
        await self._post(path, None)

    async def _post(self, path: str, body: Any) -> httpx.Response | None:
        try:
            return await self._system.client.post(f"{self._api_urls[-1]}{path}", json=body)
        except httpx.TransportError:
            return None

    # What is left

    async def _rows(self) -> list[Record]:
        query = """
            SELECT id, state, attempt, result::text AS result
              FROM asyncflow.tasks
             WHERE NOT id = ANY ($1)
        """
        return await self.db.fetch(query, self._later_tasks)

    async def _look_around(self) -> None:
        facts = self.facts
        for row in await self._rows():
            facts.rows[row["id"]] = Row(row["state"], row["attempt"], _attempt_of(row["result"]))
        entries = self._system.journal.entries(what="start")
        facts.starts = Counter(UUID(entry.task_id) for entry in entries)
        facts.left = await self.db.fetchval("SELECT count(*) FROM asyncflow.tasks_live")
        if self._system.broker_url is not None:
            facts.hints = await _messages(self._system.broker_url)


def _command(role: str) -> list[str]:
    return [role, "--port", str(free_port())] if role == "api" else [role]


def _attempt_of(result: str | None) -> int | None:
    """
    The attempt named by a result; None if it is not a result of the sweep's handlers.
    """
    found = None if result is None else json.loads(result)
    return found["attempt"] if isinstance(found, dict) else None


async def _messages(broker_url: str) -> int:
    connection = await connect(broker_url, name="sweep")
    try:
        channel = await connection.channel()
        counts = await channel.inspect_queue(broker_queue(builders.QUEUE))
        return 0 if counts is None else counts.messages
    finally:
        await connection.close()
