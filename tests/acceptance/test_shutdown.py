"""
SIGTERM and SIGINT: processes finish or release what they hold, leave nothing open, and exit with
status 0.
"""

from __future__ import annotations

import asyncio
import signal
import time

import pytest

from tests.acceptance.conftest import Engine
from tests.support.process import Process
from tests.support.system import System


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_every_process_leaves_in_good_order(
    system: System, engine: Engine, number: signal.Signals
) -> None:
    """
    Each kind of process exits with status 0 and leaves no session in PostgreSQL and no
    connection to RabbitMQ.
    """
    apis, workers, maintenances = await system.start()
    task_id = await system.submit("work")
    await system.finishes(task_id)
    processes = [*apis, *workers, *maintenances]

    for process in processes:
        process.send(number)
    statuses = [await process.exit_status(timeout_seconds=5) for process in processes]

    assert [0, 0, 0] == statuses
    assert all(process.has_logged("process.stopped") for process in processes)
    await system.until(lambda: no_sessions(system), "no session is left", timeout_seconds=2)
    if engine.broker is not None:
        await system.until(lambda: no_connections(engine), "no connection is left")
    [worker] = await system.rows("SELECT stopped_at, lost_at FROM asyncflow.workers")
    assert worker["stopped_at"] is not None
    assert worker["lost_at"] is None


async def test_a_worker_that_stops_finishes_what_it_runs(system: System) -> None:
    """
    A long task completes within the grace period, once; waiting tasks are not started.
    """
    _, [worker], _ = await system.start(worker_slots=1)
    running = await system.submit("work", {"seconds": 1})
    await system.journal.wait_for("start", running)
    waiting = await system.submit("work")

    worker.send(signal.SIGTERM)

    assert 0 == await worker.exit_status()
    task = await system.get(running)
    assert "COMPLETED" == task["status"]
    assert 1 == task["attempt"]
    assert 0 == (await system.get(waiting))["attempt"]
    await system.start_worker()
    assert "COMPLETED" == (await system.finishes(waiting))["status"]


async def test_what_does_not_finish_in_time_is_given_back_unpunished(system: System) -> None:
    """
    When the grace period is over, tasks are released in every isolation; another worker
    runs them, and no failure is counted.
    """
    _, [worker], _ = await system.start(shutdown_grace_seconds=0.2)
    names = ("work", "work-in-process")
    task_ids = [await system.submit(name, {"seconds": 6}) for name in names]
    for task_id in task_ids:
        await system.journal.wait_for("start", task_id)
    other = await system.start_worker()

    worker.send(signal.SIGTERM)
    released_from = time.monotonic()
    assert 0 == await worker.exit_status(timeout_seconds=5)

    for task_id in task_ids:
        second = await system.journal.wait_for("start", task_id, attempt=2)
        task = await system.finishes(task_id)
        assert second.time - released_from < 3
        assert "COMPLETED" == task["status"]
        assert 0 == task["failures"]
        assert ["RELEASED", "COMPLETED"] == [a["outcome"] for a in task["attempts"]]
        assert task["attempts"][1]["worker_id"] == other.lines[0]["worker_id"]


async def test_a_second_signal_forces_the_process_to_quit(system: System) -> None:
    """
    The first signal would wait for a minute; the second releases what runs, immediately.
    """
    _, [worker], _ = await system.start(shutdown_grace_seconds=60)
    task_id = await system.submit("work", {"seconds": 50})
    await system.journal.wait_for("start", task_id)

    worker.send(signal.SIGTERM)
    stopping = await worker.log_event("process.stopping")
    await system.until(lambda: is_forced_to_quit(worker), "it logs that it is forced to quit")

    assert 0 == await worker.exit_status(timeout_seconds=5)
    assert 1 == stopping["running"]
    task = await system.get(task_id)
    assert 0 == task["failures"]
    assert ["RELEASED"] == [a["outcome"] for a in task["attempts"]]


async def test_an_api_that_stops_answers_what_it_was_asked(system: System) -> None:
    """
    On SIGTERM under load every submission in flight is answered and none is lost.
    """
    [first, _], _, _ = await system.start(apis=2)

    async with system.load(clients=8, pause_seconds=0.01) as load:
        await load.has_accepted(50)
        first.send(signal.SIGTERM)
        assert 0 == await first.exit_status(timeout_seconds=10)
        await load.has_accepted(50)

    assert {"completed": len(load.accepted)} == await system.all_terminal(load.accepted)
    everything = await system.rows("SELECT count(*) FROM asyncflow.tasks")
    assert len(load.accepted) == everything[0][0]


async def test_a_rolling_restart_of_all_workers_loses_and_fails_nothing(
    system: System,
) -> None:
    """
    While workers are replaced one after another under load, every task completes, and every attempt
    ends COMPLETED or RELEASED.
    """
    _, workers, _ = await system.start(workers=3, shutdown_grace_seconds=0.3)

    async with system.load(payload={"seconds": 0.5}, clients=4) as load:
        await load.has_accepted(20)
        for worker in workers:
            await system.start_worker(shutdown_grace_seconds=0.3)
            await stop(worker)
            await load.has_accepted(10)

    assert {"completed": len(load.accepted)} == await system.all_terminal(load.accepted)
    assert await outcomes(system) <= {"released"}
    [row] = await system.rows("SELECT max(failures) AS failures FROM asyncflow.tasks")
    assert 0 == row["failures"]


async def is_forced_to_quit(worker: Process) -> bool:
    """
    Keep signalling: a signal right after the first counts as its echo.
    """
    if worker.is_running:
        worker.send(signal.SIGTERM)
    return worker.has_logged("process.force_quit")


async def stop(worker: Process) -> None:
    """
    Stop one worker gracefully.
    """
    worker.send(signal.SIGTERM)
    assert 0 == await worker.exit_status()


async def outcomes(system: System) -> set[str]:
    """
    Outcomes of all attempts that were not the last of their task.
    """
    rows = await system.rows("SELECT DISTINCT outcome FROM asyncflow.attempts")
    return {row["outcome"] for row in rows}


async def no_sessions(system: System) -> bool:
    """
    Whether the test has the only connection to the database.
    """
    query = """
        SELECT application_name FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()
    """
    return not await system.rows(query)


async def no_connections(engine: Engine) -> bool:
    """
    Whether RabbitMQ has no client.
    """
    assert engine.broker is not None
    return not await asyncio.to_thread(engine.broker.api, "GET", "connections")
