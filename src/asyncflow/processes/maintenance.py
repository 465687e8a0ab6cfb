"""
The process that runs the maintenance chores and, with a broker, the relay.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from asyncflow.processes.process import database, stop_signals, until_fit, until_stopped
from asyncflow.settings import Settings
from asyncflow.telemetry import events


async def maintain(settings: Settings) -> None:
    """
    Run the chores and, with a broker, the relay until a signal.

    Raises:
        ServerUnfit: The database needs a migration or other settings.
    """
    from asyncflow.maintenance.chores import chores, run_chore
    from asyncflow.store.wakeups import Waker

    async with database(settings, "asyncflow maintenance") as db, stop_signals(settings) as stop:
        await until_fit(db, settings, stop)
        waker = Waker(db)
        duties: list[Coroutine[Any, Any, None]] = []
        if settings.broker_url is None:
            listed = chores(retention_days=settings.retention_days, has_broker=False)
        else:
            from asyncflow.relay.relay import Relay

            relay = Relay(db, settings.broker_url, prefix=settings.broker_prefix)
            duties.append(relay.run())
            listed = chores(
                retention_days=settings.retention_days,
                has_broker=True,
                relay_trouble=lambda: relay.trouble,
            )
        duties += [run_chore(chore, db, waker) for chore in listed]
        events.process_started(broker="rabbitmq" if settings.broker_url else "none")
        await until_stopped(duties, stop)
        await waker.close()
    events.process_stopped()
