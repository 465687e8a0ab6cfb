"""
The fixtures that give a test its own database and its own corner of a broker.

Every test runs against real servers; `tests.support.choice` says on which versions.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack

import hypothesis
import pytest

from tests.support.broker import Broker
from tests.support.postgres import PostgresServer
from tests.support.servers import Servers

pytest_plugins = ["tests.support.choice"]

# A shell starts jobs in the background with Ctrl-C ignored, which their children inherit; some
# of ours are to be stopped by it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
EXAMPLES = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("tests", EXAMPLES)
hypothesis.settings.register_profile("quick", EXAMPLES, max_examples=20)


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("quick" if config.option.quick else "tests")


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """
    The servers of this run.
    """
    with ExitStack() as running:
        yield Servers(running)


@pytest.fixture(scope="session")
def postgres_server(servers: Servers, request: pytest.FixtureRequest) -> PostgresServer:
    """
    A running PostgreSQL. A test that stops it should start it again.
    """
    return servers.postgres(request.param)


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """
    The DSN of a fresh database with AsyncFlow's schema, removed after the test.
    """
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture
def empty_database_url(postgres_server: PostgresServer) -> Iterator[str]:
    """
    The DSN of a fresh database with nothing in it, removed after the test.
    """
    url = postgres_server.create_empty_database()
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(scope="session")
def broker(servers: Servers, request: pytest.FixtureRequest) -> Broker:
    """
    A running RabbitMQ. A test that stops or freezes it should start it again.
    """
    if request.config.getoption("--without-rabbitmq"):
        pytest.skip("left out by --without-rabbitmq")
    return servers.broker(request.param)


@pytest.fixture
def broker_url(broker: Broker) -> Iterator[str]:
    """
    The AMQP URL of an empty virtual host, removed after the test.
    """
    # A test that failed may have left it frozen or stopped.
    broker.resume()
    broker.start()
    url = broker.create_vhost()
    yield url
    broker.drop_vhost(url)
