"""
How RabbitMQ fares, for people who ask the API. Nothing depends on the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

from asyncflow.errors import InvalidSettings, TransportError
from asyncflow.transport.amqp import Connection, connect

RECONNECT_SECONDS = (1.0, 3.0)


class BrokerWatch:
    """
    Keeps one idle connection to the broker, for its state. Does nothing without a URL.
    """

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._connection: Connection | None = None
        self._why = "connecting"
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> str | None:
        """
        `up`, `blocked` (it takes no messages now), `down: ` and why; None without a broker.
        """
        if self._url is None:
            return None
        if self._connection is None or not self._connection.is_open:
            return f"down: {self._why}"
        return "blocked" if self._connection.blocked else "up"

    async def __aenter__(self) -> BrokerWatch:
        if self._url is not None:
            self._task = asyncio.get_running_loop().create_task(self._watch(self._url))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self, url: str) -> None:
        while True:
            try:
                self._connection = await connect(url, name="asyncflow api")
                try:
                    reason = await self._connection.wait_closed()
                finally:
                    await self._connection.close()
                self._why = str(reason)
            except (TransportError, InvalidSettings) as error:
                self._why = str(error)
            await asyncio.sleep(random.uniform(*RECONNECT_SECONDS))
