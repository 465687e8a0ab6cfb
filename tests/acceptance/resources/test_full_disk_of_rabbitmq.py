"""
RabbitMQ runs out of disk while tasks flow: it accepts no messages, submissions are unaffected,
tasks wait, and everything completes once there is space again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.acceptance.conftest import Engine
from tests.acceptance.resources.conftest import a_system
from tests.support import rabbitmq
from tests.support.broker import Broker
from tests.support.disk import SmallDisk, small_disk
from tests.support.node import ProcessBroker
from tests.support.system import System

FLOWING_AGAIN_SECONDS = 30.0
DISK_MEBIBYTES = 192
LEFT_MEBIBYTES = 10
LOOK_MILLISECONDS = 500
FREE_MIN = "50MB"
"""Below this RabbitMQ raises the alarm, as `tests.support.node` configures it."""

WORKING = {"seconds": 0.1}

Raising = Callable[[], object]


async def sits_out(system: System, *, raising: Raising, ending: Raising) -> None:
    """
    Go through an alarm and check that it delays tasks and loses none.
    """
    started = await system.start()
    _, _, [maintenance] = started

    async with system.load(payload=WORKING) as load:
        await load.has_accepted(20)
        await asyncio.to_thread(raising)
        try:
            await maintenance.log_event("broker.blocked")
            await load.has_accepted(20)
            # RabbitMQ has not read anything from the relay since then.
            waiting = await system.get(load.accepted[-1])
        finally:
            await asyncio.to_thread(ending)
        await load.has_accepted(5)
        await system.finishes(load.accepted[-1], timeout_seconds=FLOWING_AGAIN_SECONDS)

    assert "PENDING" == waiting["status"]
    assert not load.refused
    assert 0 == load.broken
    assert load.slowest_seconds < 5
    assert {"completed": len(load.accepted)} == await system.all_terminal(load.accepted)
    assert [] == await system.punished()
    assert all(process.is_running for processes in started for process in processes)


@pytest.mark.needs_rabbitmq
async def test_a_disk_alarm_of_the_broker_costs_time_and_no_task(
    system: System, engine: Engine
) -> None:
    """
    An alarm raised by a free-disk limit above what is available delays tasks and loses none.
    """
    broker = engine.broker
    assert broker is not None

    await sits_out(
        system,
        raising=lambda: broker.ctl("set_disk_free_limit", "100000GB"),
        ending=lambda: broker.ctl("set_disk_free_limit", FREE_MIN),
    )


class OnSmallDisk(NamedTuple):
    """
    A RabbitMQ, and the disk that its data is on.
    """

    broker: Broker
    disk: SmallDisk


@pytest.fixture
def cramped(request: pytest.FixtureRequest) -> Iterator[OnSmallDisk]:
    """
    A RabbitMQ whose disk can be filled.
    """
    if request.config.getoption("--without-rabbitmq"):
        pytest.skip("left out by --without-rabbitmq")
    chosen = request.config.getoption("--rabbitmq")
    version = chosen if chosen in rabbitmq.VERSIONS else rabbitmq.OLDEST
    with (
        small_disk("rabbitmq", mebibytes=DISK_MEBIBYTES) as disk,
        rabbitmq.running_broker(version, folder=disk.folder) as broker,
    ):
        if not isinstance(broker, ProcessBroker):
            pytest.skip("only a RabbitMQ that the tests run themselves can have a small disk")
        # By default it checks only every ten seconds whether the alarm is over.
        broker.ctl("eval", f"rabbit_disk_monitor:set_max_check_interval({LOOK_MILLISECONDS}).")
        yield OnSmallDisk(broker, disk)


async def test_a_full_disk_of_the_broker_costs_time_and_no_task(
    cramped: OnSmallDisk, database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """
    An alarm that RabbitMQ raises because its disk is full delays tasks and loses none.
    """
    broker, disk = cramped
    url = await asyncio.to_thread(broker.create_vhost)

    async with a_system(request, tmp_path, database_url, url) as system:
        await sits_out(system, raising=lambda: disk.fill_but(LEFT_MEBIBYTES), ending=disk.free)
