"""
A whole AsyncFlow deployment of real processes, on the servers that a test provides.

`System` starts processes and talks to them as users do: over HTTP and by commands. It queries
PostgreSQL only where a user would need a thousand requests. `Load` is a steady stream of
submissions.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import httpx

from tests.support.journal import Journal
from tests.support.ports import free_port
from tests.support.process import Process
from tests.support.waiting import PATIENCE_SECONDS

HANDLERS = Path(__file__).with_name("handlers.py")
POLL_SECONDS = 0.05
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED")
RESTART_GRACE_SECONDS = 10.0

Json = dict[str, Any]
Answer = TypeVar("Answer")


class System:
    """
    The processes of one deployment; all are killed at the end of the block.

    Args:
        broker_url: The URL of RabbitMQ; None runs on PostgreSQL alone.
        folder: The working folder of the processes, and of the journal.
        settings: Settings of every process, by their names in `Settings`.
    """

    def __init__(
        self, *, database_url: str, broker_url: str | None, folder: Path, **settings: object
    ) -> None:
        self.database_url = database_url
        self.broker_url = broker_url
        self.folder = folder
        self.journal = Journal(folder / "journal")
        self.processes: list[Process] = []
        self.settings: dict[str, object] = {
            "database_url": database_url,
            "broker_url": broker_url or "",
            "log_format": "json",
            "test_journal": self.journal.file,
            **settings,
        }
        self.client = httpx.AsyncClient(timeout=15)
        self._urls: list[str] = []
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> System:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.client.aclose()
        await asyncio.gather(*(process.end() for process in self.processes))

    def tails(self) -> list[tuple[str, str]]:
        """
        The name and the end of the output of each process.
        """
        return [(process.name, process.tail()) for process in self.processes]

    # Processes

    async def start(
        self, *, apis: int = 1, workers: int = 1, maintenances: int = 1, **settings: Any
    ) -> tuple[list[Process], list[Process], list[Process]]:
        """
        Start this many processes of each kind concurrently, and return them when they are ready.
        """
        started = await asyncio.gather(
            *(self.start_api(**settings) for _ in range(apis)),
            *(self.start_worker(**settings) for _ in range(workers)),
            *(self.start_maintenance(**settings) for _ in range(maintenances)),
        )
        return (
            started[:apis],
            started[apis : apis + workers],
            started[apis + workers :],
        )

    async def start_api(self, *, port: int | None = None, **settings: Any) -> Process:
        """
        Start an API on a free port, or on a given one, such as a former API's.
        """
        port = port or free_port()
        process = await self.run("api", "--port", str(port), **settings)
        line = await process.log_event("process.started")
        await self.reaches_api(line["url"])
        return process

    async def reaches_api(self, url: str) -> None:
        """
        Wait until an API answers at `url`, and send requests to it from now on.
        """
        await self.answers(lambda: self.client.get(f"{url}/health/live"))
        if url not in self._urls:
            self._urls.append(url)

    async def start_worker(
        self,
        *arguments: str,
        handlers: Sequence[Path] = (HANDLERS,),
        python: Path | None = None,
        **settings: object,
    ) -> Process:
        """
        Start a worker; return when it is registered and RabbitMQ serves it.
        """
        options = itertools.chain.from_iterable(("--handlers", str(file)) for file in handlers)
        process = await self.run("worker", *options, *arguments, python=python, **settings)
        line = await process.log_event("process.started")
        await self.knows_worker(line["worker_id"])
        if self.broker_url is not None:
            await process.log_event("broker.connected")
        return process

    async def start_maintenance(self, **settings: Any) -> Process:
        """
        Start a maintenance process.
        """
        process = await self.run("maintenance", **settings)
        await process.log_event("process.started")
        return process

    async def run(
        self, role: str, *arguments: str, python: Path | None = None, **settings: Any
    ) -> Process:
        """
        Start any command, without waiting for it.
        """
        name = f"{role}-{next(self._numbers)}"
        process = await Process.start(
            name,
            role,
            *arguments,
            settings={**self.settings, **settings},
            folder=self.folder,
            python=python,
        )
        self.processes.append(process)
        return process

    async def command(self, *arguments: str, expected_status: int = 0) -> str:
        """
        Run a command to its end and return what it printed.
        """
        process = await self.run(*arguments)
        assert expected_status == await process.exit_status(), process.tail()
        # It has ended as expected; `processes` holds only the long-running ones.
        self.processes.remove(process)
        return process.output

    async def knows_worker(self, worker_id: str) -> None:
        """
        Wait until a worker is registered and alive.
        """
        registered = "SELECT 1 FROM asyncflow.workers WHERE id = $1 AND lost_at IS NULL"
        await self.until(lambda: self.rows(registered, worker_id), "the worker registers")

    # HTTP

    @property
    def url(self) -> str:
        """
        The address of one of the APIs, in turn.
        """
        self._urls.append(self._urls.pop(0))
        return self._urls[-1]

    async def submit(self, name: str, payload: Json | None = None, **fields: object) -> str:
        """
        Submit one task, which must be accepted, and return its id.
        """
        body = {"name": name, "payload": payload or {}, **fields}
        response = await self.client.post(f"{self.url}/tasks", json=body)
        assert 202 == response.status_code, response.text
        return str(response.json()["id"])

    async def submit_batch(self, tasks: Sequence[Json]) -> list[str]:
        """
        Submit up to 1,000 tasks in one batch and return their ids in order.
        """
        response = await self.client.post(f"{self.url}/tasks/batch", json={"tasks": tasks})
        assert 202 == response.status_code, response.text
        return [str(task["id"]) for task in response.json()["tasks"]]

    async def get(self, task_id: str) -> Json:
        """
        Read one task.
        """
        response = await self.client.get(f"{self.url}/tasks/{task_id}")
        assert 200 == response.status_code, response.text
        return dict(response.json())

    async def post(self, task_id: str, verb: str) -> httpx.Response:
        """
        `cancel`, `redrive` or `run-now` a task.
        """
        return await self.client.post(f"{self.url}/tasks/{task_id}/{verb}")

    async def reaches(
        self, task_id: str, *statuses: str, timeout_seconds: float = PATIENCE_SECONDS
    ) -> Json:
        """
        Wait until the task has one of `statuses`, and return it; tolerates outages.
        """
        task: Json = {}

        async def is_there() -> bool:
            nonlocal task
            response = await self.client.get(f"{self.url}/tasks/{task_id}")
            if response.status_code != 503:
                assert 200 == response.status_code, response.text
                task = response.json()
            return task.get("status") in statuses

        try:
            await self.until(is_there, f"{task_id} is {statuses}", timeout_seconds=timeout_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {task}") from None
        return task

    async def finishes(self, task_id: str, *, timeout_seconds: float = PATIENCE_SECONDS) -> Json:
        """
        Wait until the task is terminal, and return it.
        """
        return await self.reaches(task_id, *TERMINAL, timeout_seconds=timeout_seconds)

    async def answers(
        self,
        request: Callable[[], Awaitable[httpx.Response]],
        *,
        timeout_seconds: float = PATIENCE_SECONDS,
    ) -> httpx.Response:
        """
        Repeat `request` until it is answered with 200, and return the answer.
        """
        response: httpx.Response | None = None

        async def is_answered() -> bool:
            nonlocal response
            with contextlib.suppress(httpx.TransportError):
                response = await request()
            return response is not None and response.status_code == 200

        await self.until(is_answered, "the API answers", timeout_seconds=timeout_seconds)
        assert response is not None
        return response

    # PostgreSQL

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        """
        Query the database directly.
        """
        connection = await asyncpg.connect(self.database_url)
        try:
            return list(await connection.fetch(query, *arguments))
        finally:
            await connection.close()

    async def states(self, task_ids: Collection[str]) -> Counter[str]:
        """
        The number of these tasks in each state; `missing` counts those that do not exist.
        """
        query = """
            SELECT state, count(*) FROM asyncflow.tasks WHERE id = ANY ($1) GROUP BY state
        """
        rows = await self.rows(query, list(task_ids))
        states = Counter({str(row["state"]): int(row["count"]) for row in rows})
        states["missing"] = len(set(task_ids)) - states.total()
        return +states

    async def all_terminal(
        self, task_ids: Collection[str], *, timeout_seconds: float = PATIENCE_SECONDS
    ) -> Counter[str]:
        """
        Wait until all of these tasks are terminal; return the number in each state.
        """
        states: Counter[str] = Counter()

        async def are_terminal() -> bool:
            nonlocal states
            states = await self.states(task_ids)
            return sum(states[status.lower()] for status in TERMINAL) == len(set(task_ids))

        try:
            await self.until(
                are_terminal, "all tasks are terminal", timeout_seconds=timeout_seconds
            )
        except AssertionError as error:
            raise AssertionError(f"{error}: {dict(states)}") from None
        return states

    async def is_drained(self, *, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """
        Wait until every task has ended; cheaper than `all_terminal` for many tasks.
        """
        left = "SELECT 1 FROM asyncflow.tasks_live LIMIT 1"

        async def is_empty() -> bool:
            return not await self.rows(left)

        await self.until(is_empty, "every task has ended", timeout_seconds=timeout_seconds)

    async def has_lost_nothing(self, load: Load) -> None:
        """
        Assert that every submission was accepted or told when to retry, that every accepted task
        completes, and that every process is still running.
        """
        assert {503} == set(load.refused)
        assert None not in load.retry_after
        assert 0 == load.broken
        assert {"completed": len(load.accepted)} == await self.all_terminal(load.accepted)
        assert all(process.is_running for process in self.processes)

    async def punished(self) -> list[str]:
        """
        The ids of tasks with a failure, counted in this generation or recorded by an attempt.
        """
        rows = await self.rows("""
            SELECT id FROM asyncflow.tasks WHERE failures > 0
             UNION
            SELECT task_id FROM asyncflow.attempts WHERE outcome = 'retried'
        """)
        return [str(row["id"]) for row in rows]

    async def locks_prove_death(self) -> None:
        """
        Wait until PostgreSQL has run long enough that a free lock proves its worker dead.
        """
        query = """
            SELECT 1 WHERE pg_postmaster_start_time() < now() - $1 * interval '1 second'
        """
        await self.until(
            lambda: self.rows(query, RESTART_GRACE_SECONDS), "PostgreSQL has run for a while"
        )

    async def until(
        self,
        condition: Callable[[], Awaitable[object]],
        expectation: str,
        *,
        timeout_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        """
        Wait until `condition` holds.
        """
        deadline = time.monotonic() + timeout_seconds
        while not await condition():
            assert time.monotonic() < deadline, (
                f"{expectation}: not so within {timeout_seconds:g} s"
            )
            await asyncio.sleep(POLL_SECONDS)

    @asynccontextmanager
    async def load(self, name: str = "work", **options: Any) -> AsyncIterator[Load]:
        """
        Submit tasks until the end of the block; see `Load`.
        """
        load = Load(self, name, **options)
        running = asyncio.create_task(load.run())
        try:
            yield load
        finally:
            load.stop()
            await running


class Load:
    """
    Clients that submit one task after another and continue after an error.

    Attributes:
        accepted: The ids of tasks that were answered 202, oldest first.
        refused: The number of submissions with another answer, by status.
        broken: The number of submissions without an answer.
        slowest_seconds: The longest time until a 202.
    """

    def __init__(
        self,
        system: System,
        name: str,
        *,
        payload: Mapping[str, object] | None = None,
        clients: int = 2,
        pause_seconds: float = 0.05,
    ) -> None:
        self.accepted: list[str] = []
        self.refused: Counter[int] = Counter()
        self.retry_after: set[str | None] = set()
        self.broken = 0
        self.slowest_seconds = 0.0
        self._system = system
        self._body = {"name": name, "payload": dict(payload or {})}
        self._clients = clients
        self._pause_seconds = pause_seconds
        self._more = asyncio.Event()
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """
        Stop submitting.
        """
        self._stopped.set()

    async def has_accepted(self, count: int, *, timeout_seconds: float = PATIENCE_SECONDS) -> None:
        """
        Wait until `count` more tasks are accepted.
        """
        wanted = len(self.accepted) + count
        try:
            async with asyncio.timeout(timeout_seconds):
                while len(self.accepted) < wanted:
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(
                f"{count} more tasks were not accepted within {timeout_seconds:g} s: "
                f"{len(self.accepted)} accepted, {self.refused}, {self.broken} broken"
            ) from None

    async def is_refused(self) -> None:
        """
        Wait until a submission is answered with anything but 202.
        """
        while not self.refused:
            self._more.clear()
            await self._more.wait()

    async def run(self) -> None:
        """
        Submit until stopped.
        """
        await asyncio.gather(*(self._submit_again_and_again() for _ in range(self._clients)))

    async def _submit_again_and_again(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                response = await self._system.client.post(
                    f"{self._system.url}/tasks", json=self._body
                )
            except httpx.TransportError:
                self.broken += 1
            else:
                self._note(response, time.monotonic() - began)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause_seconds):
                    await self._stopped.wait()

    def _note(self, response: httpx.Response, seconds: float) -> None:
        if response.status_code == 202:
            self.accepted.append(response.json()["id"])
            self.slowest_seconds = max(self.slowest_seconds, seconds)
        else:
            self.refused[response.status_code] += 1
            self.retry_after.add(response.headers.get("Retry-After"))
        self._more.set()
