"""
The servers that all tests of a run share: one of each version.

Each starts when a test first needs it and runs until the end, so that tests may run in any order.
"""

from __future__ import annotations

from contextlib import ExitStack

from tests.support import postgres, rabbitmq
from tests.support.broker import Broker
from tests.support.postgres import PostgresServer


class Servers:
    """
    Returns the running server of a version, or starts it.

    Args:
        running: Stops them when it closes.
    """

    def __init__(self, running: ExitStack) -> None:
        self._running = running
        self._postgres: dict[str, PostgresServer] = {}
        self._brokers: dict[str, Broker] = {}

    def postgres(self, major: str) -> PostgresServer:
        """
        A PostgreSQL of this major version; skips the test if it is not installed.
        """
        if major not in self._postgres:
            starting = postgres.running_server(major)
            self._postgres[major] = self._running.enter_context(starting)
        return self._postgres[major]

    def broker(self, version: str) -> Broker:
        """
        A RabbitMQ of this version; skips the test if there is none.
        """
        if version not in self._brokers:
            starting = rabbitmq.running_broker(version)
            self._brokers[version] = self._running.enter_context(starting)
        return self._brokers[version]
