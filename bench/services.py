"""
The PostgreSQL and RabbitMQ of one run, the same for every system.

PostgreSQL is the one AsyncFlow brings along, with its stock settings but for `SETTINGS`, in
a folder on disk. RabbitMQ comes from where the tests get theirs (`tests/support`). Every
measurement starts from a new database and a new virtual host.
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
        broker: None where there is no RabbitMQ to be had.
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
        What a process of the measurement must know; see `addresses`.
        """
        broker = {} if self._vhost is None else {addresses.BROKER: self._vhost}
        return {addresses.POSTGRES: self._postgres.url, **broker}

    @property
    def versions(self) -> dict[str, str]:
        """
        Which servers these are.
        """
        with psycopg.connect(self._postgres.url) as connection:
            postgres = str(connection.info.parameter_status("server_version"))
        broker = self.broker.version if self.broker else "none"
        return {"PostgreSQL": postgres, "RabbitMQ": broker}

    def renew(self) -> None:
        """
        Create the database and the virtual host again, empty.
        """
        with psycopg.connect(self._postgres.url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {addresses.DATABASE} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {addresses.DATABASE}")
            # What the last measurement left to write must not be written during the next.
            connection.execute("CHECKPOINT")
        if self.broker is not None:
            if self._vhost is not None:
                self.broker.drop_vhost(self._vhost)
            self._vhost = self.broker.create_vhost()
        os.environ.update(self.environment)

    @contextmanager
    def another_database(self) -> Iterator[str]:
        """
        Make a second database for the block, and give its DSN.
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
        Bring the planner's statistics up to date and leave autovacuum nothing to do.
        """
        with psycopg.connect(addresses.database_url(), autocommit=True) as connection:
            connection.execute("VACUUM ANALYZE")

    def messages(self, queue: str) -> int:
        """
        How many messages wait in a queue of the measurement's virtual host; 0 without RabbitMQ.
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
        CPU time of each server since its start, sessions that have ended included.
        """
        used = {"PostgreSQL": tree_cpu_seconds(self._postgres.pid)}
        if self.broker is not None and self.broker.pid is not None:
            used["RabbitMQ"] = tree_cpu_seconds(self.broker.pid)
        return used


@contextmanager
def running_services(*, with_broker: bool) -> Iterator[Services]:
    """
    Run both servers until the end of the block; RabbitMQ only if it can be had.
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
        # Stock: as many schedulers as there are cores, where the tests give it one.
        with rabbitmq.running_broker(rabbitmq.OLDEST, erlang_arguments="") as broker:
            yield broker
    except pytest.skip.Exception as reason:
        raise SystemExit(f"bench: {reason}") from None
