"""
What people are told about RabbitMQ follows RabbitMQ.
"""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.transport import watch
from asyncflow.transport.watch import BrokerWatch
from tests.support.broker import Broker
from tests.support.tasks import until


async def until_state(watched: BrokerWatch, beginning: str) -> None:
    """
    Wait until the state begins like this.
    """

    async def as_expected() -> bool:
        return (watched.state or "").startswith(beginning)

    await until(as_expected)


async def test_without_a_broker_there_is_no_state() -> None:
    """
    PostgreSQL alone is a complete system.
    """
    async with BrokerWatch(None) as watched:
        assert watched.state is None


async def test_the_state_follows_the_broker(
    broker: Broker, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Up, down with a reason that holds no password, and up again.
    """
    monkeypatch.setattr(watch, "RECONNECT_SECONDS", (0.1, 0.2))
    async with BrokerWatch(broker_url) as watched:
        await until_state(watched, "up")

        await asyncio.to_thread(broker.stop)
        await until_state(watched, "down: ")
        assert "guest" not in (watched.state or "")

        await asyncio.to_thread(broker.start)
        await until_state(watched, "up")
