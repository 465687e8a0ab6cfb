"""
RabbitMQ is stopped, killed, emptied and erased while tasks flow: submissions are unaffected, no
task is lost, and tasks flow again within ten seconds of its return.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from tests.acceptance.conftest import Engine
from tests.support.broker import Broker
from tests.support.system import HANDLERS, Load, System

pytestmark = pytest.mark.needs_rabbitmq

FLOWING_AGAIN_SECONDS = 10.0
WORKING = {"seconds": 0.1}

Damage = Callable[[Broker, str], None]


@pytest.fixture
def rabbit(engine: Engine) -> Broker:
    """
    The RabbitMQ of the system.
    """
    assert engine.broker is not None
    return engine.broker


@asynccontextmanager
async def flowing(system: System) -> AsyncIterator[Load]:
    """
    A flowing load, checked at the end: no task lost, no submission refused or slow.
    """
    await system.start(apis=2, workers=2, maintenances=2)
    async with system.load(payload=WORKING) as load:
        await load.has_accepted(20)
        yield load
        await flows(system, load)

    assert not load.refused
    assert 0 == load.broken
    assert load.slowest_seconds < 5
    assert {"completed": len(load.accepted)} == await system.all_terminal(load.accepted)


async def flows(system: System, load: Load) -> None:
    """
    Wait until a task submitted from now on completes.
    """
    await load.has_accepted(5)
    await system.finishes(load.accepted[-1], timeout_seconds=FLOWING_AGAIN_SECONDS)


@pytest.mark.parametrize("ending", ["stop", "kill"])
async def test_a_broker_that_stops_or_dies_costs_time_and_no_task(
    system: System, rabbit: Broker, ending: str
) -> None:
    """
    Tasks are accepted while RabbitMQ is down and flow once it is back.
    """
    end: Callable[[], None] = getattr(rabbit, ending)

    async with flowing(system) as load:
        # RabbitMQ 4.0 takes up to a second to write a new quorum queue's member down. Killed
        # before that, it starts the member without an election: the queue is dead for good.
        await load.has_accepted(60)
        await asyncio.to_thread(end)
        await load.has_accepted(20)
        await system.until(lambda: broker_is(system, "unusable: "), "an outage in /health/ready")
        await asyncio.to_thread(rabbit.start)
        await system.until(lambda: broker_is(system, "up"), "its end in /health/ready")


async def broker_is(system: System, beginning: str) -> bool:
    """
    Whether the API is ready and reports this state of RabbitMQ.
    """
    health = await system.client.get(f"{system.url}/health/ready")
    assert 200 == health.status_code
    return bool(health.json()["broker"].startswith(beginning))


def purge(broker: Broker, vhost: str) -> None:
    """
    Purge every waiting message.
    """
    for queue in broker.api("GET", f"queues/{vhost}"):
        broker.api("DELETE", f"queues/{vhost}/{queue['name']}/contents")


def delete(broker: Broker, vhost: str) -> None:
    """
    Delete every queue under its consumers.
    """
    for queue in broker.api("GET", f"queues/{vhost}"):
        broker.api("DELETE", f"queues/{vhost}/{queue['name']}", ignore_missing=True)


def erase(broker: Broker, vhost: str) -> None:
    """
    Delete the virtual host with everything in it, and create it again.
    """
    broker.api("DELETE", f"vhosts/{vhost}")
    broker.api("PUT", f"vhosts/{vhost}", {})


@pytest.mark.parametrize("damage", [purge, delete, erase])
async def test_a_broker_that_forgets_costs_time_and_no_task(
    system: System, rabbit: Broker, damage: Damage
) -> None:
    """
    When a backlog of messages inside RabbitMQ vanishes, each of its tasks still completes.
    """
    assert system.broker_url is not None
    vhost = urlsplit(system.broker_url).path[1:]

    async with flowing(system):
        backlog = await system.submit_batch([{"name": "work", "payload": WORKING}] * 300)
        await system.until(lambda: some_are_queued(system), "a backlog in RabbitMQ")
        await asyncio.to_thread(damage, rabbit, vhost)

    assert {"completed": 300} == await system.all_terminal(backlog)


def some_are_queued(system: System) -> Awaitable[object]:
    """
    Whether some tasks wait inside RabbitMQ.
    """
    return system.rows("SELECT 1 FROM asyncflow.tasks WHERE state = 'queued'")


async def test_processes_start_without_a_broker_and_use_it_when_it_comes(
    system: System, rabbit: Broker
) -> None:
    """
    The API accepts tasks before RabbitMQ is available; they flow once it is.
    """
    await asyncio.to_thread(rabbit.stop)
    _, worker, maintenance = await asyncio.gather(
        system.start_api(),
        system.run("worker", "--handlers", str(HANDLERS)),
        system.run("maintenance"),
    )
    for process in (worker, maintenance):
        await process.log_event("broker.unavailable")
    task_ids = [await system.submit("work") for _ in range(10)]

    await asyncio.to_thread(rabbit.start)

    for task_id in task_ids:
        await system.finishes(task_id, timeout_seconds=FLOWING_AGAIN_SECONDS)
    assert {"completed": 10} == await system.states(task_ids)
