"""
Wake-ups: "something is due" over LISTEN and NOTIFY, so that idle workers and the relay start
immediately instead of at their next poll.

A wake-up carries nothing and may be lost: polling is the safety net. It is never sent inside
a transaction that does work, because a commit that notifies takes a lock over the whole
server (PostgreSQL, "NOTIFY", notes on commit order).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from asyncflow.aio.background import Background, start_task
from asyncflow.aio.waiting import set_within
from asyncflow.errors import StoreUnavailable
from asyncflow.store.database import Database, Executor, translated_errors

CHANNEL = "asyncflow_due"
RECONNECT_SECONDS = 0.5
CHECK_SECONDS = 5.0

NOTIFY = f"""
    SELECT pg_notify('{CHANNEL}', '')
"""


async def send_wakeup(db: Executor) -> None:
    """
    Wake every listener now.
    """
    await db.execute(NOTIFY)


class Waker:
    """
    Sends wake-ups without making anyone wait for them.

    However many `wake` calls come while one is on its way, one more follows.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._wanted = False
        self._sending: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """
        Ask for a wake-up of every listener soon. A failure is ignored: they poll, too.
        """
        self._wanted = True
        if self._sending is None:
            self._sending = start_task(self._send(), name="wake-up")

    async def close(self) -> None:
        """
        Let a wake-up that is on its way arrive.
        """
        if self._sending is not None:
            await asyncio.wait([self._sending])

    async def _send(self) -> None:
        try:
            while self._wanted:
                self._wanted = False
                await send_wakeup(self._db)
        except StoreUnavailable:
            pass
        finally:
            self._sending = None


class Listener:
    """
    Calls `on_wakeup` for every wake-up, and after each gap in listening.

    Holds one connection of its own and replaces it when it breaks. Behind a pooler in
    transaction mode, which has no LISTEN, it does nothing: pollers poll.
    """

    def __init__(
        self,
        db: Database,
        on_wakeup: Callable[[], None],
        *,
        reconnect_seconds: float = RECONNECT_SECONDS,
    ) -> None:
        self._db = db
        self._on_wakeup = on_wakeup
        self._reconnect_seconds = reconnect_seconds
        self._background = Background(self._listen)

    async def __aenter__(self) -> Listener:
        if not self._db.pooler:
            self._background.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._background.stop()

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(StoreUnavailable):
                await self._listen_until_broken()
            await asyncio.sleep(self._reconnect_seconds)

    async def _listen_until_broken(self) -> None:
        connection = await self._db.connect("wake-ups", timeout_seconds=CHECK_SECONDS)
        broken = asyncio.Event()
        connection.add_termination_listener(lambda _: broken.set())
        try:
            with translated_errors():
                await connection.add_listener(CHANNEL, lambda *_: self._on_wakeup())
                # What was notified before this moment went unheard.
                self._on_wakeup()
                while not await set_within(broken, CHECK_SECONDS):
                    # A connection can also die in silence; a statement finds out.
                    await connection.execute("SELECT 1")
        finally:
            connection.terminate()
