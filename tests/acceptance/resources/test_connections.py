"""
PostgreSQL without a free connection, both before AsyncFlow's processes start and while they work.
"""

from __future__ import annotations

import asyncio
import contextlib

import asyncpg

from tests.support.ports import free_port
from tests.support.system import HANDLERS, System

FLOWING_AGAIN_SECONDS = 30.0
WORKING = {"seconds": 0.1}
REASON = "too many clients"


class ForeignSessions:
    """
    Another application, which takes every connection as soon as it is free and releases all of them
    at the end of the block.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._sessions: list[asyncpg.Connection] = []
        self._was_refused = asyncio.Event()

    async def __aenter__(self) -> ForeignSessions:
        self._taking = asyncio.create_task(self._take())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._taking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._taking
        for session in self._sessions:
            session.terminate()

    async def have_everything(self) -> None:
        """
        Evict AsyncFlow's sessions; return once it has none and can get none.
        """
        is_done = False
        while not is_done:
            # A connection freed after the last check is taken now.
            self._was_refused.clear()
            await self._was_refused.wait()
            is_done = not await self._end_sessions_of_others()

    async def _take(self) -> None:
        while True:
            try:
                self._sessions.append(await asyncpg.connect(self._url))
            except asyncpg.TooManyConnectionsError:
                self._was_refused.set()
                await asyncio.sleep(0.005)

    async def _end_sessions_of_others(self) -> int:
        own = [session.get_server_pid() for session in self._sessions]
        ended = await self._sessions[0].fetchval(
            "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND NOT pid = ANY ($1)",
            own,
        )
        return int(ended)


async def test_a_database_without_a_free_connection_costs_time_and_no_task(system: System) -> None:
    """
    When all of AsyncFlow's sessions are lost and no connection is free, the API answers 503 with
    Retry-After, the logs say why, and everything recovers once connections are available.
    """
    _, [worker], [maintenance] = await system.start()

    async with system.load(payload=WORKING) as load:
        await load.has_accepted(20)
        async with ForeignSessions(system.database_url) as foreign:
            await foreign.have_everything()
            await load.is_refused()
            health = await system.client.get(f"{system.url}/health/ready")
            live = await system.client.get(f"{system.url}/health/live")
            for process in (worker, maintenance):
                await process.complains(REASON)
        await load.has_accepted(5)
        await system.finishes(load.accepted[-1], timeout_seconds=FLOWING_AGAIN_SECONDS)

    assert (503, 200) == (health.status_code, live.status_code)
    await system.has_lost_nothing(load)
    assert [] == await system.punished()


async def test_processes_wait_for_a_free_connection_and_then_work(alone: System) -> None:
    """
    A process started while no connection is free says so and keeps running; it needs no restart.
    """
    async with ForeignSessions(alone.database_url) as foreign:
        await foreign.have_everything()
        api, worker, maintenance = await asyncio.gather(
            alone.run("api", "--port", str(free_port())),
            alone.run("worker", "--handlers", str(HANDLERS)),
            alone.run("maintenance"),
        )
        for process in (api, worker, maintenance):
            line = await process.log_event("database.unavailable", where="start")
            assert REASON in line["reason"]

    line = await api.log_event("process.started")
    await alone.reaches_api(line["url"])
    task_id = await alone.submit("work")
    assert "COMPLETED" == (await alone.finishes(task_id))["status"]
    assert all(process.is_running for process in (api, worker, maintenance))
