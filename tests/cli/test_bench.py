"""
`asyncflow bench` against real workers.
"""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from asyncflow.cli import measuring
from asyncflow.cli.measuring import Bench, payload_of
from asyncflow.errors import CannotMeasure
from asyncflow.store import workers
from asyncflow.store.database import Database
from asyncflow.store.workers import Registration
from tests.support.programs import Program, environment, finished, running


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """
    A fresh database.
    """
    async with Database(database_url) as opened:
        yield opened


@contextmanager
def a_worker(folder: Path, env: Mapping[str, str]) -> Iterator[Program]:
    """
    Run a worker and wait until it is registered.
    """
    with running("worker", folder=folder, env=env) as worker:
        worker.until("process.started")
        yield worker


async def a_worker_on_paper(db: Database) -> None:
    """
    Register a worker that appears alive in the database and never takes a task.
    """
    await workers.register(
        db,
        Registration(
            id=uuid4(),
            name="paper",
            queues=("default",),
            handlers=(measuring.HANDLER,),
            slots=1,
            heartbeat_seconds=60,
            lease_seconds=3600,
        ),
    )


async def tasks_in(db: Database) -> int:
    """
    The number of tasks in the database, in any state.
    """
    return int(await db.fetchval("SELECT count(*) FROM asyncflow.tasks"))


async def test_a_deployment_is_measured_and_left_as_it_was(
    database_url: str, db: Database, tmp_path: Path
) -> None:
    """
    The figures are complete and consistent, and no task of the measurement remains.
    """
    env = environment(database_url=database_url)

    with a_worker(tmp_path, env):
        ended = finished("bench", "--tasks", "300", "--json", folder=tmp_path, env=env)

    assert 0 == ended.returncode, ended.stderr
    figures = json.loads(ended.stdout)
    assert (1, 10) == (figures["workers"], figures["slots"])
    for way in ("one_by_one", "in_batches"):
        assert (300, 300) == (figures[way]["tasks"], figures[way]["completed"])
        assert 0 < figures[way]["completed_per_second"]
        assert 0 < figures[way]["submitted_per_second"]
    latency = figures["latency"]
    assert latency["tasks"] == measuring.TRICKLE_TASKS
    for moment in ("start_ms", "finish_ms"):
        assert 0 < latency[moment]["p50"] <= latency[moment]["p95"] <= latency[moment]["p99"]
    assert latency["start_ms"]["p50"] < latency["finish_ms"]["p50"]
    assert figures["removed"] == 1 + measuring.TRICKLE_TASKS + 600
    assert 0 == await tasks_in(db)


async def test_the_figures_are_shown_for_people(
    database_url: str, broker_url: str, db: Database, tmp_path: Path
) -> None:
    """
    The output names what was measured; `--keep` keeps the tasks, with the requested size.

    The workers use a broker here; the command itself needs none.
    """
    env = environment(database_url=database_url, broker_url=broker_url)
    options = ("--tasks", "100", "--payload-bytes", "3000", "--keep")

    with a_worker(tmp_path, env), running("maintenance", folder=tmp_path, env=env):
        ended = finished("bench", *options, folder=tmp_path, env=env)

    assert 0 == ended.returncode, ended.stderr
    assert "1 worker process, 10 slots" in ended.stdout
    assert "one by one, 32 callers" in ended.stdout
    assert "until it starts" in ended.stdout
    assert "The tasks were kept." in ended.stdout
    expected = 1 + measuring.TRICKLE_TASKS + 200
    assert await tasks_in(db) == expected
    completed = "SELECT count(*) FROM asyncflow.tasks WHERE state = 'completed'"
    assert await db.fetchval(completed) == expected
    sizes = "SELECT array_agg(DISTINCT length(payload::text)) FROM asyncflow.tasks"
    assert [3000] == await db.fetchval(sizes)


def test_without_a_worker_the_answer_is_a_sentence(database_url: str, tmp_path: Path) -> None:
    """
    Without a worker nothing is submitted, and the error says what would help.
    """
    env = environment(database_url=database_url)

    ended = finished("bench", "--queue", "mail", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert "No live worker offers 'sample-task' on queue 'mail'" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_paused_queue_is_not_measured(
    database_url: str, db: Database, tmp_path: Path
) -> None:
    """
    A paused queue is refused: its tasks would never start.
    """
    await a_worker_on_paper(db)
    env = environment(database_url=database_url)
    finished("queue", "pause", "default", folder=tmp_path, env=env)

    ended = finished("bench", folder=tmp_path, env=env)

    assert (2, 0) == (ended.returncode, await tasks_in(db))
    assert "Queue 'default' is paused" in ended.stderr


def test_a_database_without_a_schema_is_told_apart(empty_database_url: str, tmp_path: Path) -> None:
    """
    The error for a missing schema differs from that for an unreachable database.
    """
    env = environment(database_url=empty_database_url)
    without = environment(database_url="postgresql://nobody@127.0.0.1:1/nothing")

    empty = finished("bench", folder=tmp_path, env=env)
    absent = finished("bench", folder=tmp_path, env=without)

    assert (2, 1) == (empty.returncode, absent.returncode)
    assert "run `asyncflow migrate`" in empty.stderr
    assert "PostgreSQL cannot serve now" in absent.stderr


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--payload-bytes", "2000000"), "ASYNCFLOW_PAYLOAD_BYTES_MAX"),
        (("--queue", "two words"), "invalid queue name"),
        (("--tasks", "0"), "--tasks"),
    ],
)
def test_an_option_out_of_range_is_refused(
    options: tuple[str, ...], fault: str, database_url: str, tmp_path: Path
) -> None:
    """
    An option out of range is refused before the database is accessed.
    """
    env = environment(database_url=database_url)

    ended = finished("bench", *options, folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert fault in ended.stderr


async def test_a_measurement_that_is_broken_off_leaves_no_tasks(
    database_url: str, db: Database, tmp_path: Path
) -> None:
    """
    Ctrl-C removes the tasks that are still pending.
    """
    await a_worker_on_paper(db)
    env = environment(database_url=database_url)

    with running("bench", folder=tmp_path, env=env) as bench:
        while not await tasks_in(db):
            assert bench.process.poll() is None, bench.output
        bench.send(signal.SIGINT)
        status = bench.ended()

    assert (130, 0) == (status, await tasks_in(db))


async def test_tasks_that_nobody_takes_end_the_measurement(db: Database) -> None:
    """
    If no worker takes the tasks, the measurement fails and lists possible reasons.
    """
    await a_worker_on_paper(db)
    bench = Bench(db, queue="default", payload_bytes=0, stall_seconds=0.0)
    await bench.capacity()

    with pytest.raises(CannotMeasure, match="made no progress"):
        await bench.measure(100)
    await bench.close()
    removed = await bench.remove()

    assert (1, 0) == (removed, await tasks_in(db))


async def test_a_running_task_is_not_removed(db: Database) -> None:
    """
    A running task is left to the worker that holds its lease.
    """
    bench = Bench(db, queue="default", payload_bytes=0)
    await bench._submit(bench._new_tasks(2))
    connection = await db.connect("test")
    await connection.execute(
        "UPDATE asyncflow.tasks SET state = 'running', lease_id = gen_random_uuid(), "
        "worker_id = gen_random_uuid() WHERE id = (SELECT id FROM asyncflow.tasks LIMIT 1)"
    )
    await connection.close()

    await bench.close()
    removed = await bench.remove()

    assert (1, 1) == (removed, await tasks_in(db))


@pytest.mark.parametrize("size", [0, 13, 14, 25, 26, 1000])
def test_a_payload_has_the_size_that_was_asked_for(size: int) -> None:
    """
    A payload has the requested size, or the smallest that the handler needs.
    """
    payload = payload_of(size)

    assert 0 == json.loads(payload)["seconds"]
    assert size <= len(payload) <= max(size, 25)
    if size >= 25:
        assert size == len(payload)
