"""
Where the tests get RabbitMQ: from the first of these that is available.

    ASYNCFLOW_TEST_BROKER_URL   a broker somewhere, which tests cannot stop or freeze
    a Debian folder             see `debian`; both versions, needs Linux and root
    rabbitmq-server             version 4 or newer on the PATH
    Docker                      both versions
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest

from tests.support import debian, docker
from tests.support.broker import Broker
from tests.support.docker import DockerBroker
from tests.support.node import DebianTree, OnPath, ProcessBroker

OLDEST = "4.0"
NEWEST = "4.3"
VERSIONS = (OLDEST, NEWEST)

WHAT_WOULD_HELP = (
    "run bin/test as root on Debian (it fetches one), install rabbitmq-server 4 or Docker, "
    "or set ASYNCFLOW_TEST_BROKER_URL, or leave these tests out with --without-rabbitmq"
)


@contextmanager
def running_broker(version: str, **options: Any) -> Iterator[Broker]:
    """
    Run a broker until the end of the block, or skip the test if there is none.

    Args:
        options: Of a `ProcessBroker`, if it is one.
    """
    broker = _find_broker(version, **options)
    try:
        broker.start()
        if int(broker.version.partition(".")[0]) < 4:
            pytest.skip(f"RabbitMQ {broker.version} is too old: {WHAT_WOULD_HELP}")
        yield broker
    finally:
        broker.close()


def missing(versions: Sequence[str]) -> list[str]:
    """
    Which of these versions are not available here, and what would help; empty if all are.
    """
    if is_chosen_by_hand() or shutil.which("rabbitmq-server") or docker.is_usable():
        return []
    absent = [version for version in versions if debian.ready_tree(version) is None]
    if absent:
        return [f"There is no RabbitMQ {' or '.join(absent)} here: {WHAT_WOULD_HELP}."]
    return []


def is_chosen_by_hand() -> bool:
    """
    Whether the tests were given an external broker.
    """
    return "ASYNCFLOW_TEST_BROKER_URL" in os.environ


def _find_broker(version: str, **options: Any) -> Broker:
    if is_chosen_by_hand():
        _only_the_oldest(version, "ASYNCFLOW_TEST_BROKER_URL")
        return RemoteBroker(os.environ["ASYNCFLOW_TEST_BROKER_URL"])
    tree = debian.ready_tree(version)
    if tree is not None:
        return ProcessBroker(DebianTree(tree), **options)
    if shutil.which("rabbitmq-server"):
        _only_the_oldest(version, "the rabbitmq-server on the PATH")
        return ProcessBroker(OnPath(), **options)
    if docker.is_usable():
        return DockerBroker(version)
    pytest.skip(missing([version])[0])


def _only_the_oldest(version: str, source: str) -> None:
    if version != OLDEST:
        pytest.skip(f"{source} is one broker; it already served as the {OLDEST} of the tests")


class RemoteBroker(Broker):
    """
    An external broker; its management plugin must answer on port 15672.
    """

    def __init__(self, url: str) -> None:
        host = urlsplit(url).hostname or "localhost"
        super().__init__(url, f"http://{host}:15672")

    @property
    def pid(self) -> int | None:
        return None

    def start(self) -> None:
        if not self.answers():
            raise RuntimeError("The management plugin of ASYNCFLOW_TEST_BROKER_URL is silent.")

    def stop(self) -> None:
        self._beyond_us("stopped")

    def kill(self) -> None:
        self._beyond_us("killed")

    def pause(self) -> None:
        self._beyond_us("frozen")

    def resume(self) -> None:
        """
        Do nothing: it was never frozen.
        """

    def wipe(self) -> None:
        self._beyond_us("wiped")

    def close(self) -> None:
        """
        Do nothing: it is not ours.
        """

    def ctl(self, *arguments: str) -> str:
        self._beyond_us("asked by rabbitmqctl")

    def _beyond_us(self, participle: str) -> NoReturn:
        pytest.skip(f"the broker of ASYNCFLOW_TEST_BROKER_URL cannot be {participle} from here")
