"""
Clients that submit, cancel, redrive and read over HTTP, and record the responses.

Every operation is recorded as an *invoke* and later as *ok*, *fail* (refused: it did not happen) or
*info* (unknown). A submission of unknown outcome is repeated under another number, as a client
without an idempotency key must do: both may be stored, and the checker must find each at most
once, and a batch completely or not at all.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from asyncflow.aio.waiting import set_within
from asyncflow.verify.history import History
from asyncflow.verify.workload import PlannedTask, Workload

TIMEOUT_SECONDS = 5.0
RETRY_SECONDS = (0.1, 0.5)
TRIES_MAX = 3
FOLLOW_TRIES_MAX = 5
IN_FLIGHT_MAX = 400
"""Concurrent submissions. An API that hangs holds at most half of them."""

Json = dict[str, Any]


class Unanswered(Exception):
    """
    There was no complete response; the request may have taken effect.
    """


class Clients:
    """
    Many concurrent clients that together submit `rate` tasks per second.
    """

    def __init__(
        self, ports: Sequence[int], workload: Workload, history: History, *, seed: int, rate: float
    ) -> None:
        self._ports = itertools.cycle(ports)
        self._workload = workload
        self._history = history
        self._chance = random.Random(f"clients {seed}")
        self._rate = rate
        self._stopped = asyncio.Event()
        self._room = asyncio.Semaphore(IN_FLIGHT_MAX)

    def stop(self) -> None:
        """
        Stop submitting.
        """
        self._stopped.set()

    async def run(self) -> None:
        """
        Submit until stopped, then wait for every follow-up.
        """
        async with asyncio.TaskGroup() as group:
            due = time.monotonic()
            while not self._stopped.is_set():
                call = self._workload.next_call()
                # Missed submissions are not made up for, to avoid a herd after an outage.
                wait = self._chance.expovariate(self._rate / len(call))
                due = max(due + wait, time.monotonic() - 1)
                await self._rest(due - time.monotonic())
                await self._room.acquire()
                group.create_task(self._submit(call, group))

    async def _submit(self, call: list[PlannedTask], group: asyncio.TaskGroup) -> None:
        try:
            for _ in range(TRIES_MAX):
                if await self._is_answered(call, group):
                    return
                await self._rest(self._chance.uniform(*RETRY_SECONDS))
                if self._stopped.is_set():
                    return
                call = self._workload.again(call)
        finally:
            self._room.release()

    async def _is_answered(self, call: list[PlannedTask], group: asyncio.TaskGroup) -> bool:
        batch = {"batch": call[0].number} if len(call) > 1 else {}
        self._history.write_all(
            "submit.invoke",
            [
                {
                    "n": planned.number,
                    "recipe": planned.recipe,
                    "digest": planned.digest,
                    "times": planned.body["payload"].get("times", 0),
                    **batch,
                }
                for planned in call
            ],
        )
        try:
            status, answer = await self._post([_body(planned) for planned in call])
        except Unanswered as error:
            status, answer = 0, {"detail": str(error)}
        if status == 202:
            tasks = [task["id"] for task in (answer["tasks"] if batch else [answer])]
            pairs = list(zip(call, tasks, strict=True))
            self._history.write_all("submit.ok", [{"n": p.number, "task": t} for p, t in pairs])
            for planned, task in pairs:
                for step in self._follow_up(planned, task):
                    group.create_task(step)
            return True
        is_refused = 400 <= status < 500
        told = {"status": status, "detail": str(answer.get("detail", answer))[:200], **batch}
        self._history.write_all(
            "submit.fail" if is_refused else "submit.info",
            [{"n": planned.number, **told} for planned in call],
        )
        return is_refused

    async def _post(self, bodies: list[Json]) -> tuple[int, Json]:
        if len(bodies) == 1:
            return await self._request("POST", "/tasks", bodies[0])
        return await self._request("POST", "/tasks/batch", {"tasks": bodies})

    def _follow_up(self, planned: PlannedTask, task: str) -> list[Coroutine[Any, Any, None]]:
        steps = []
        if planned.cancel_after is not None:
            steps.append(self._steer(task, "cancel", planned.cancel_after))
        if planned.redrive_after is not None:
            steps.append(self._steer(task, "redrive", planned.redrive_after))
        if planned.reads:
            steps.append(self._read_repeatedly(task, planned.reads))
        return steps

    async def _steer(self, task: str, verb: str, after: float) -> None:
        await asyncio.sleep(after)
        for _ in range(FOLLOW_TRIES_MAX):
            self._history.write(f"{verb}.invoke", task=task)
            try:
                status, answer = await self._request("POST", f"/tasks/{task}/{verb}")
            except Unanswered as error:
                self._history.write(f"{verb}.info", task=task, detail=str(error))
            else:
                if status < 500:
                    outcome = "ok" if status < 300 else "fail"
                    self._history.write(
                        f"{verb}.{outcome}", task=task, status=status, state=answer.get("status")
                    )
                    return
                self._history.write(f"{verb}.info", task=task, status=status)
            await asyncio.sleep(self._chance.uniform(*RETRY_SECONDS))

    async def _read_repeatedly(self, task: str, reads: int) -> None:
        for _ in range(reads):
            await asyncio.sleep(self._chance.uniform(0.05, 1.0))
            try:
                status, answer = await self._request("GET", f"/tasks/{task}")
            except Unanswered:
                continue
            if status < 500:
                facts = {k: answer.get(k) for k in ("generation", "attempt", "failures")}
                self._history.write(
                    "read", task=task, status=status, state=answer.get("status"), **facts
                )

    async def _request(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        """
        One HTTP exchange on a new connection, with each API in turn.

        Raises:
            Unanswered: There was no complete response.
        """
        return await request(next(self._ports), method, path, body)

    async def _rest(self, seconds: float) -> None:
        if seconds > 0:
            await set_within(self._stopped, seconds)


def _body(planned: PlannedTask) -> Json:
    if planned.expires_after is None:
        return planned.body
    expires_at = datetime.now(UTC) + timedelta(seconds=planned.expires_after)
    return {**planned.body, "expires_at": expires_at.isoformat()}


async def request(port: int, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
    """
    One HTTP exchange with 127.0.0.1 on a new connection; returns status and JSON.

    Raises:
        Unanswered: There was no complete response; the request may have taken effect.
    """
    content = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(head.encode() + content)
                status = int((await reader.readuntil(b"\r\n")).split()[1])
                headers = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(headers.partition(b"content-length:")[2].split(b"\r\n")[0])
                answer = json.loads(await reader.readexactly(size))
            finally:
                writer.transport.abort()
    except (OSError, EOFError, TimeoutError, ValueError, IndexError) as error:
        raise Unanswered(repr(error)) from error
    return status, answer
