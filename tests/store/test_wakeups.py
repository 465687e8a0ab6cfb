"""
Wake-ups arrive immediately, resume after a broken connection, and are no more frequent than needed.
"""

from __future__ import annotations

import asyncio

from asyncflow.store.database import Database
from asyncflow.store.wakeups import CHANNEL, Listener, Waker, send_wakeup

PATIENCE_SECONDS = 20.0


class Bell:
    """
    Counts wake-ups and lets a test wait for the next one.
    """

    def __init__(self) -> None:
        self.rings = 0
        self._rang = asyncio.Event()

    def ring(self) -> None:
        """
        The callback of a listener.
        """
        self.rings += 1
        self._rang.set()

    async def wait(self) -> None:
        """
        Wait for a wake-up that came after the last call.
        """
        async with asyncio.timeout(PATIENCE_SECONDS):
            await self._rang.wait()
        self._rang.clear()


async def test_a_listener_is_woken_when_it_begins_and_for_every_wakeup(db: Database) -> None:
    """
    A new listener calls back once on its own, for wake-ups sent before it listened.
    """
    bell = Bell()
    async with Listener(db, bell.ring):
        await bell.wait()
        for _ in range(3):
            await send_wakeup(db)
            await bell.wait()

    assert 4 == bell.rings


async def test_every_listener_is_woken(db: Database) -> None:
    """
    Every listener is woken, since any of them may have a free slot.
    """
    one, two = Bell(), Bell()
    async with Listener(db, one.ring), Listener(db, two.ring):
        await one.wait()
        await two.wait()

        await send_wakeup(db)

        await one.wait()
        await two.wait()


async def test_a_listener_whose_connection_was_cut_comes_back_and_looks(db: Database) -> None:
    """
    After a cut connection a listener calls back soon, not at its next check: the gap may have
    hidden a wake-up.
    """
    bell = Bell()
    async with Listener(db, bell.ring):
        await bell.wait()

        cut = await db.fetchval(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE $1",
            f'LISTEN "{CHANNEL}"%',
        )

        async with asyncio.timeout(4):
            await bell.wait()
        await send_wakeup(db)
        await bell.wait()
    assert 1 == cut


async def test_a_burst_of_wakes_sends_one_more_wakeup(db: Database) -> None:
    """
    While a wake-up is in flight, any number of submissions cause only one more.
    """
    heard: list[str] = []
    end = asyncio.Event()
    connection = await db.connect("listener")
    await connection.add_listener(CHANNEL, lambda *_: heard.append(CHANNEL))
    await connection.add_listener("the_end", lambda *_: end.set())
    waker = Waker(db)

    waker.wake()
    # Let the sending begin.
    await asyncio.sleep(0)
    for _ in range(1_000):
        waker.wake()
    await waker.close()

    # Notifications keep their order: none can still be behind this one.
    await db.execute("SELECT pg_notify('the_end', '')")
    async with asyncio.timeout(PATIENCE_SECONDS):
        await end.wait()
    connection.terminate()
    assert [CHANNEL] * 2 == heard


async def test_a_wake_during_a_wakeup_is_not_lost(db: Database) -> None:
    """
    A wake during a wake-up is sent too, since it may stand for a task committed after the first one
    was sent.
    """
    bell = Bell()
    waker = Waker(db)
    async with Listener(db, bell.ring):
        await bell.wait()
        for _ in range(20):
            waker.wake()
            # Let the sending begin.
            await asyncio.sleep(0)
            before = bell.rings
            waker.wake()
            await waker.close()
            await bell.wait()

            assert bell.rings > before


async def test_waking_fails_silently_while_the_database_is_down() -> None:
    """
    A wake during an outage raises nothing: submissions do not depend on it, and the next one tries
    again.
    """
    async with Database("postgresql://nobody@127.0.0.1:1/nothing") as down:
        waker = Waker(down)
        waker.wake()
        await waker.close()
        waker.wake()
        await waker.close()


async def test_a_listener_starts_before_its_database() -> None:
    """
    A listener started before its database keeps trying, and stops on request.
    """
    bell = Bell()
    async with Database("postgresql://nobody@127.0.0.1:1/nothing") as down:
        async with Listener(down, bell.ring):
            await asyncio.sleep(0)

    assert 0 == bell.rings


async def test_behind_a_pooler_a_listener_does_nothing(shared_database_url: str) -> None:
    """
    In transaction mode there is no LISTEN, so a listener does nothing and its owner must poll.
    """
    bell = Bell()
    async with Database(shared_database_url, size=1, pooler=True) as pooled:
        async with Listener(pooled, bell.ring):
            await send_wakeup(pooled)

    assert 0 == bell.rings
