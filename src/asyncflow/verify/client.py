"""
Clients: they submit, cancel, redrive and read over HTTP, and write down what they were told.

Every operation is an *invoke* and later one of *ok*, *fail* (refused: it did not happen) and
*info* (nobody knows). A submission of unknown outcome is made again, under another number: both
may be stored, and the checker must find each at most once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from asyncflow.verify.history import History
from asyncflow.verify.workload import Planned, Workload

TIMEOUT_SECONDS = 5.0
RETRY_SECONDS = (0.1, 0.5)
FOLLOW_TRIES_MAX = 5

Json = dict[str, Any]


class Unanswered(Exception):
    """
    The request may or may not have been carried out.
    """


class Clients:
    """
    A number of clients side by side, together submitting `rate` tasks per second.
    """

    def __init__(
        self,
        ports: Sequence[int],
        workload: Workload,
        history: History,
        *,
        seed: int,
        rate: float,
        sessions: int = 8,
    ) -> None:
        self._ports = itertools.cycle(ports)
        self._workload = workload
        self._history = history
        self._chance = random.Random(f"clients {seed}")
        self._pause = sessions / rate
        self._sessions = sessions
        self._stopped = asyncio.Event()
        self._following: set[asyncio.Task[None]] = set()
        self.accepted = 0
        self.unknown = 0

    def stop(self) -> None:
        """
        Submit no more.
        """
        self._stopped.set()

    async def run(self) -> None:
        """
        Submit until stopped, and return when every follow-up is done.
        """
        await asyncio.gather(*(self._submit_on_and_on() for _ in range(self._sessions)))
        while self._following:
            await asyncio.wait(self._following)

    async def _submit_on_and_on(self) -> None:
        due = time.monotonic()
        while not self._stopped.is_set():
            # What could not be submitted in time is not made up for: no herd after an outage.
            due = max(due + self._chance.expovariate(1 / self._pause), time.monotonic() - 1)
            await self._rest(due - time.monotonic())
            await self._submit(self._workload.next())

    async def _submit(self, planned: Planned) -> None:
        number = planned.number
        self._history.write(
            "submit.invoke",
            n=number,
            recipe=planned.recipe,
            digest=planned.digest,
            body={**planned.body, "payload": {**planned.body["payload"], "pad": "…"}},
        )
        try:
            status, answer = await self._request("POST", "/tasks", planned.body)
        except Unanswered as error:
            status, answer = 0, {"detail": str(error)}
        if status == 202:
            self.accepted += 1
            self._history.write("submit.ok", n=number, task=answer["id"])
            self._follow(planned, answer["id"])
        elif 400 <= status < 500:
            self._history.write("submit.fail", n=number, status=status, detail=answer)
        else:
            self.unknown += 1
            self._history.write("submit.info", n=number, status=status, detail=answer)
            await self._rest(self._chance.uniform(*RETRY_SECONDS))

    def _follow(self, planned: Planned, task: str) -> None:
        steps = []
        if planned.cancel_after is not None:
            steps.append(self._steer(task, "cancel", planned.cancel_after))
        if planned.redrive_after is not None:
            steps.append(self._steer(task, "redrive", planned.redrive_after))
        if planned.reads:
            steps.append(self._read_on_and_on(task, planned.reads))
        for step in steps:
            following = asyncio.get_running_loop().create_task(step)
            self._following.add(following)
            following.add_done_callback(self._following.discard)

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

    async def _read_on_and_on(self, task: str, reads: int) -> None:
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
        One HTTP exchange on a connection of its own, with one API after the other.

        Raises:
            Unanswered: No whole answer came.
        """
        return await request(next(self._ports), method, path, body)

    async def _rest(self, seconds: float) -> None:
        if seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
            except TimeoutError:
                pass


async def request(port: int, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
    """
    One HTTP exchange with 127.0.0.1 on a connection of its own: status and JSON.

    Raises:
        Unanswered: No whole answer came; the request may have been carried out.
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
