"""
The two engines, and systems of real processes on them.

A test that takes `engine`, directly or through `system`, runs on PostgreSQL alone and on
PostgreSQL with RabbitMQ, unless a marker limits it to one of them. A test's systems end with the
test; `shared` serves a whole module of tests that leave the system undisturbed.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support import rabbitmq
from tests.support.broker import Broker
from tests.support.postgres import PostgresServer
from tests.support.servers import Servers
from tests.support.system import System

ON_POSTGRES = "alone"

# A log line per request would bury the output of the processes.
logging.getLogger("httpx").setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Engine:
    """
    What carries hints; `broker` is None on PostgreSQL alone.
    """

    broker: Broker | None

    def make_vhost(self) -> str | None:
        """
        The AMQP URL of an empty virtual host; None without a broker.
        """
        if self.broker is None:
            return None
        # A failed test may have left the broker frozen or stopped.
        self.broker.resume()
        self.broker.start()
        return self.broker.create_vhost()

    def drop_vhost(self, url: str | None) -> None:
        """
        Remove the virtual host.
        """
        if self.broker is not None and url is not None:
            self.broker.start()
            self.broker.drop_vhost(url)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_rabbitmq: run only on the engine with RabbitMQ")
    config.addinivalue_line("markers", "any_engine: one of the two engines is enough")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" not in metafunc.fixturenames:
        return
    definition = metafunc.definition
    option = metafunc.config.getoption("--rabbitmq")
    every = "both" if definition.get_closest_marker("every_rabbitmq") else rabbitmq.OLDEST
    engines = [] if definition.get_closest_marker("needs_rabbitmq") else [ON_POSTGRES]
    if not definition.get_closest_marker("any_engine"):
        engines += [v for v in rabbitmq.VERSIONS if (option or every) in (v, "both")]
    ids = [engine if engine == ON_POSTGRES else f"rabbitmq-{engine}" for engine in engines]
    metafunc.parametrize("engine", engines, ids=ids, indirect=True, scope="session")


@pytest.fixture(scope="session")
def engine(servers: Servers, request: pytest.FixtureRequest) -> Engine:
    """
    One of the two engines.
    """
    if request.param == ON_POSTGRES:
        return Engine(None)
    if request.config.getoption("--without-rabbitmq"):
        pytest.skip("left out by --without-rabbitmq")
    return Engine(servers.broker(request.param))


@pytest.fixture
def vhost_url(engine: Engine) -> Iterator[str | None]:
    """
    The virtual host of this test, None on PostgreSQL alone.
    """
    url = engine.make_vhost()
    yield url
    engine.drop_vhost(url)


@pytest.fixture
async def system(
    database_url: str, vhost_url: str | None, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[System]:
    """
    A system with no process started yet.
    """
    async with System(database_url=database_url, broker_url=vhost_url, folder=tmp_path) as system:
        yield system
    show_logs(request, system)


@pytest.fixture(scope="module")
def shared_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """
    The database of `shared`.
    """
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="module")
def shared_vhost_url(engine: Engine) -> Iterator[str | None]:
    """
    The virtual host of `shared`.
    """
    url = engine.make_vhost()
    yield url
    engine.drop_vhost(url)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_system(
    shared_database_url: str,
    shared_vhost_url: str | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[System]:
    """
    The system behind `shared`.
    """
    async with System(
        database_url=shared_database_url,
        broker_url=shared_vhost_url,
        folder=tmp_path_factory.mktemp("shared"),
        cancel_grace_seconds=1,
    ) as system:
        await system.start()
        yield system


@pytest.fixture
def shared(shared_system: System, request: pytest.FixtureRequest) -> Iterator[System]:
    """
    A running API, worker and maintenance process, shared by all tests of a module.

    Tests that use it run on the module's event loop: mark them `asyncio(loop_scope="module")`.
    """
    yield shared_system
    show_logs(request, shared_system)


def show_logs(request: pytest.FixtureRequest, system: System) -> None:
    """
    Add the last output of the processes to the report of a failed test.
    """
    for name, tail in system.tails():
        request.node.add_report_section("teardown", name, tail)
