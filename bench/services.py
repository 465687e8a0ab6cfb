"""
The PostgreSQL and RabbitMQ of one run, shared by all systems.

PostgreSQL is the one bundled with AsyncFlow, with stock settings except for `SETTINGS`, in a folder
on disk. RabbitMQ comes from the same source as in the tests (`tests/support`). Every measurement
starts with a new database and a new virtual host.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pika
import psycopg
import pytest

from asyncflow.embedded import Cluster
from bench import addresses
from bench.processes import tree_cpu_seconds
from tests.support import fetch, rabbitmq
from tests.support.broker import Broker

SETTINGS = {"shared_buffers": "256MB"}


class Services:
    """
    Both servers while they run.

    Attributes:
        broker: None if RabbitMQ is not available.
        folder: Where PostgreSQL keeps its data.
    """

    def __init__(self, postgres: Cluster, broker: Broker | None) -> None:
        self.broker = broker
        self.folder = postgres.folder
        self._postgres = postgres
        self._vhost: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """
        The environment of the measurement's processes; see `addresses`.
        """
        broker = {} if self._vhost is None else {addresses.BROKER: self._vhost}
        return {addresses.POSTGRES: self._postgres.url, **broker}

    @property
    def versions(self) -> dict[str, str]:
        """
        The versions of the servers.
        """
        with psycopg.connect(self._postgres.url) as connection:
            postgres = str(connection.info.parameter_status("server_version"))
        broker = self.broker.version if self.broker else "none"
        return {"PostgreSQL": postgres, "RabbitMQ": broker}

    def renew(self) -> None:
        """
        Recreate the database and the virtual host, empty.
        """
        with psycopg.connect(self._postgres.url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {addresses.DATABASE} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {addresses.DATABASE}")
            # Pending writes of the last measurement must not be flushed during the next one.
            connection.execute("CHECKPOINT")
        if self.broker is not None:
            if self._vhost is not None:
                self.broker.drop_vhost(self._vhost)
            self._vhost = self.broker.create_vhost()
        os.environ.update(self.environment)

    @contextmanager
    def another_database(self) -> Iterator[str]:
        """
        Create a second database for the block; yields its DSN.
        """
        name = f"{addresses.DATABASE}_another"
        with psycopg.connect(self._postgres.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
            try:
                yield urlsplit(self._postgres.url)._replace(path=f"/{name}").geturl()
            finally:
                connection.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def vacuum(self) -> None:
        """
        Update the planner's statistics and leave nothing for autovacuum to do.
        """
        with psycopg.connect(addresses.database_url(), autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")

    def messages(self, queue: str) -> int:
        """
        Number of messages in a queue of the measurement's virtual host; 0 without RabbitMQ.
        """
        if self._vhost is None:
            return 0
        connection = pika.BlockingConnection(pika.URLParameters(self._vhost))
        try:
            declared = connection.channel().queue_declare(queue, passive=True)
            return int(declared.method.message_count)
        finally:
            connection.close()

    def cpu_seconds(self) -> dict[str, float]:
        """
        CPU time of each server since its start, including ended sessions.
        """
        used = {"PostgreSQL": tree_cpu_seconds(self._postgres.pid)}
        if self.broker is not None and self.broker.pid is not None:
            used["RabbitMQ"] = tree_cpu_seconds(self.broker.pid)
        return used


@contextmanager
def running_services(*, with_broker: bool) -> Iterator[Services]:
    """
    Run both servers for the block; RabbitMQ only if it is available.
    """
    folder = Path(tempfile.mkdtemp(prefix="asyncflow-bench-"))
    try:
        with (
            Cluster(folder / "postgres", settings=SETTINGS) as cluster,
            _running_broker(wanted=with_broker) as broker,
        ):
            yield Services(cluster, broker)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _running_broker(*, wanted: bool) -> Iterator[Broker | None]:
    if not wanted:
        yield None
        return
    fetch.fetch([], [rabbitmq.OLDEST], say=print)
    if missing := rabbitmq.missing([rabbitmq.OLDEST]):
        print(missing[0])
        yield None
        return
    try:
        # Stock: one scheduler per core; the tests run it with a single one.
        with rabbitmq.running_broker(rabbitmq.OLDEST, erlang_arguments="") as broker:
            yield broker
    except pytest.skip.Exception as reason:
        raise SystemExit(f"bench: {reason}") from None
