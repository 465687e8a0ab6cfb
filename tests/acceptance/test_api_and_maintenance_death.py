"""
API and maintenance processes die: every task that was answered 202 exists and completes.
"""

from __future__ import annotations

import asyncio

from tests.support.system import System


async def test_a_202_survives_the_death_of_the_api_that_gave_it(system: System) -> None:
    """
    After kill -9 of the API amid many submissions, every task it answered with 202 completes.
    """
    [api], _, _ = await system.start()

    async with system.load(clients=32, pause_seconds=0) as load:
        await load.has_accepted(100)
        await api.kill()
    accepted = load.accepted.copy()
    await system.start_api(port=int(system.url.rpartition(":")[2]))

    assert load.broken > 0
    assert {"completed": len(accepted)} == await system.all_terminal(accepted)
    # It was killed with submissions in flight; tasks stored but not yet answered complete too.
    everything = await system.rows("SELECT id::text FROM asyncflow.tasks")
    await system.all_terminal([row["id"] for row in everything])


async def test_no_submission_is_lost_when_one_of_two_apis_dies(system: System) -> None:
    """
    The other API keeps accepting tasks, and everything that either accepted completes.
    """
    [first, _], _, _ = await system.start(apis=2)

    async with system.load(clients=8, pause_seconds=0.01) as load:
        await load.has_accepted(50)
        await first.kill()
        await load.has_accepted(50)

    assert not load.refused
    assert {"completed": len(load.accepted)} == await system.all_terminal(load.accepted)


async def test_tasks_flow_on_when_a_maintenance_process_dies(system: System) -> None:
    """
    After kill -9 of either of two maintenance processes, even the relay's leader, the other
    takes over within five seconds, and no task is stuck.
    """
    _, _, maintenances = await system.start(maintenances=2)

    async with system.load() as load:
        await load.has_accepted(20)
        for number in range(2):
            await maintenances[number].kill()
            await load.has_accepted(5)
            flowing = load.accepted[-1]
            await system.finishes(flowing, timeout_seconds=5)
            maintenances.append(await system.start_maintenance())

    assert {"completed": len(load.accepted)} == await system.all_terminal(load.accepted)


async def test_without_maintenance_nothing_is_lost(system: System) -> None:
    """
    Tasks that need the relay or the reaper wait, and complete when maintenance is back.
    """
    _, _, [maintenance] = await system.start()
    await maintenance.kill()

    delayed = await system.submit("work", delay_seconds=0.5)
    task_ids = await asyncio.gather(*(system.submit("work") for _ in range(20)))
    await system.start_maintenance()

    assert {"completed": 21} == await system.all_terminal([delayed, *task_ids])
