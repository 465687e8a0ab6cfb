"""
All cases of one engine, several at a time, while the tests wait for the findings one by one.

A case spends most of its time waiting: for a process to start, for a lease to expire. Run
concurrently, the cases take a fraction of that time, and each is still its own test.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future

import asyncpg

from tests.faults.cases import Case
from tests.faults.finding import HEAD, Finding
from tests.faults.trial import Ground, perform
from tests.support.system import RESTART_GRACE_SECONDS

AT_ONCE = 8
POLL_SECONDS = 0.1


class Sweep:
    """
    Runs cases in a thread, in the given order, until all are done or it is stopped.
    """

    def __init__(self, ground: Ground, cases: Iterable[Case]) -> None:
        self._ground = ground
        self._findings: dict[Case, Future[Finding]] = {case: Future() for case in cases}
        self._waiting = deque(self._findings)
        self._thread = threading.Thread(target=self._run, name="sweep")
        self._began = time.monotonic()
        self._thread.start()

    def finding(self, case: Case) -> Finding:
        """
        Wait until this case is done.
        """
        return self._findings[case].result()

    def stop(self) -> None:
        """
        Start no further case, and wait for those in flight.
        """
        self._waiting.clear()
        self._thread.join()

    def report(self) -> str:
        """
        One line for every finished case.
        """
        done = [f.result() for f in self._findings.values() if f.done() and not f.exception()]
        held = sum(not finding.faults for finding in done)
        seconds = time.monotonic() - self._began
        summary = f"{held} of {len(done)} cases held, {seconds:.0f} s"
        return "\n".join([HEAD, *(finding.line() for finding in done), summary, ""])

    def _run(self) -> None:
        try:
            asyncio.run(self._perform_all())
        except BaseException as error:
            for future in self._findings.values():
                if not future.done():
                    future.set_exception(error)
            raise

    async def _perform_all(self) -> None:
        await self._until_locks_prove_death()
        await asyncio.gather(*(self._take_turns() for _ in range(AT_ONCE)))

    async def _take_turns(self) -> None:
        while self._waiting:
            case = self._waiting.popleft()
            try:
                self._findings[case].set_result(await perform(case, self._ground))
            except Exception as error:
                self._findings[case].set_exception(error)

    async def _until_locks_prove_death(self) -> None:
        """
        Wait until PostgreSQL has run long enough for the reaper to declare workers dead.
        """
        query = "SELECT now() - pg_postmaster_start_time() > $1 * interval '1 second'"
        connection = await asyncpg.connect(self._ground.postgres.cluster.url)
        try:
            while not await connection.fetchval(query, RESTART_GRACE_SECONDS):  # noqa: ASYNC110 - its clock
                await asyncio.sleep(POLL_SECONDS)
        finally:
            await connection.close()
