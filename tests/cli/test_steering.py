"""
`asyncflow migrate`, `task …` and `queue …` against a real database.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from uuid import uuid4

import asyncpg
import pytest

from tests.support.programs import environment, finished

Run = Callable[..., CompletedProcess[str]]

SUBMIT = """
    INSERT INTO asyncflow.tasks (id, tenant_id, name, queue, priority, run_at, payload)
    VALUES ($1, 1, $2, 'default', 4, now(), $3)
"""


@pytest.fixture
def run(database_url: str, tmp_path: Path) -> Run:
    """
    Run a command on a fresh database.
    """
    env = environment(database_url=database_url)
    return lambda *arguments: finished(*arguments, folder=tmp_path, env=env)


A_WORKER = """
    INSERT INTO asyncflow.workers
           (id, name, queues, handlers, slots, heartbeat_seconds, lease_seconds)
    VALUES ($1, 'host:7', '{default,mail}', '{wait}', 10, 1, 15)
"""

RUN = """
    UPDATE asyncflow.tasks
       SET state = 'running', attempt = 1, started_at = now(), worker_id = $2, lease_id = $1
     WHERE id = $1
       AND state = 'pending'
"""

FAIL = """
    UPDATE asyncflow.tasks
       SET state = 'failed', finished_at = now(), started_at = now(), attempt = 1, failure = $2
     WHERE id = $1
       AND state = 'pending'
"""


async def _execute(url: str, statement: str, *values: object) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(statement, *values)
    await connection.close()


async def _a_task(url: str, *, name: str = "wait", payload: str = "{}") -> str:
    connection = await asyncpg.connect(url)
    task_id = uuid4()
    await connection.execute(SUBMIT, task_id, name, payload)
    await connection.close()
    return str(task_id)


def test_migrate_says_what_it_did_and_can_be_repeated(
    empty_database_url: str, tmp_path: Path
) -> None:
    """
    A second run finds nothing to do and succeeds.
    """
    env = environment(database_url=empty_database_url)

    first = finished("migrate", folder=tmp_path, env=env)
    second = finished("migrate", folder=tmp_path, env=env)

    assert (0, 0) == (first.returncode, second.returncode)
    assert "is now" in first.stdout
    assert "already" in second.stdout


async def test_a_task_is_shown_as_the_api_would(run: Run, database_url: str) -> None:
    """
    `--json` prints the response of GET /tasks/{id}.
    """
    task_id = await _a_task(database_url, payload='{"order": 7}')

    shown = json.loads(run("task", "get", task_id, "--json").stdout)

    assert task_id == shown["id"]
    assert "PENDING" == shown["status"]
    assert {"order": 7} == shown["payload"]


async def test_a_task_is_shown_for_people(run: Run, database_url: str) -> None:
    """
    The readable form says why the task does not start.
    """
    task_id = await _a_task(database_url)

    shown = run("task", "get", task_id).stdout

    assert "PENDING" in shown
    assert "No live worker offers 'wait'" in " ".join(shown.split())


async def test_a_payload_cannot_steer_the_terminal(run: Run, database_url: str) -> None:
    """
    Control characters in a payload are replaced in the output.
    """
    task_id = await _a_task(database_url, payload='{"a": "\x9b31m"}')

    shown = run("task", "get", task_id).stdout

    assert "\x9b" not in shown


async def test_a_list_is_filtered_and_says_how_to_go_on(run: Run, database_url: str) -> None:
    """
    Filters apply, and the printed cursor leads to the next page.
    """
    for name in ("wait", "wait", "wait", "other"):
        await _a_task(database_url, name=name)

    first = run("task", "list", "--name", "wait", "--limit", "2").stdout
    cursor = first.split("--cursor=")[1].strip()
    waiting = ("--status", "pending", "--status", "QUEUED")
    second = run("task", "list", "--name", "wait", *waiting, "--cursor", cursor).stdout

    assert 2 == first.count("PENDING")
    assert 1 == second.count("PENDING")
    assert "other" not in first + second


async def test_a_task_is_cancelled_and_redriven(run: Run, database_url: str) -> None:
    """
    Both commands print the task in its new state.
    """
    task_id = await _a_task(database_url)

    cancelled = json.loads(run("task", "cancel", task_id, "--json").stdout)
    redriven = json.loads(run("task", "redrive", task_id, "--json").stdout)

    assert "CANCELLED" == cancelled["status"]
    assert ("PENDING", 2) == (redriven["status"], redriven["generation"])


async def test_a_waiting_task_is_run_now(run: Run, database_url: str) -> None:
    """
    The task is due immediately and is printed.
    """
    task_id = await _a_task(database_url)
    connection = await asyncpg.connect(database_url)
    await connection.execute("UPDATE asyncflow.tasks SET run_at = now() + interval '1 hour'")
    await connection.close()

    before = json.loads(run("task", "get", task_id, "--json").stdout)
    after = json.loads(run("task", "run-now", task_id, "--json").stdout)

    assert ("SCHEDULED", "PENDING") == (before["status"], after["status"])


async def test_what_a_task_does_not_allow_is_a_sentence(run: Run, database_url: str) -> None:
    """
    The sentence names the state and what would have worked.
    """
    task_id = await _a_task(database_url)

    ended = run("task", "redrive", task_id)

    assert 2 == ended.returncode
    assert f"asyncflow: Task {task_id} is pending; only" in ended.stderr


def test_an_unknown_task_is_a_sentence(run: Run) -> None:
    """
    One sentence is printed; the exit status lets scripts tell it from a usage error.
    """
    task_id = uuid4()

    ended = run("task", "get", str(task_id))

    assert (3, f"asyncflow: No task with id {task_id}.\n") == (ended.returncode, ended.stderr)


def test_an_unknown_status_is_answered_with_the_known_ones(run: Run) -> None:
    """
    The error lists the valid statuses, before the database is accessed.
    """
    ended = run("task", "list", "--status", "lost")

    assert 2 == ended.returncode
    assert "RETRYING" in ended.stderr


async def test_a_queue_is_paused_and_resumed(run: Run, database_url: str) -> None:
    """
    While a queue is paused, its tasks say that they are waiting for it.
    """
    task_id = await _a_task(database_url)

    run("queue", "pause", "default")
    paused = json.loads(run("task", "get", task_id, "--json").stdout)
    resumed = run("queue", "resume", "default")

    assert "is paused" in paused["waiting_for"]
    assert 0 == resumed.returncode


async def test_a_queue_nobody_knows_is_not_paused(run: Run, database_url: str) -> None:
    """
    An unknown name is refused with the names that exist; --force allows queues that do not exist
    yet.
    """
    await _a_task(database_url)

    slip = run("queue", "pause", "deflaut")
    resumed = run("queue", "resume", "deflaut")
    forced = run("queue", "pause", "deflaut", "--force")

    assert (3, "asyncflow: No queue named 'deflaut'; known queues: default.\n") == (
        slip.returncode,
        slip.stderr,
    )
    assert (3, 0) == (resumed.returncode, forced.returncode)


async def test_queues_are_listed_with_what_waits_and_who_serves_them(
    run: Run, database_url: str
) -> None:
    """
    The list includes a queue that is only paused, one that is only served, and one that has tasks.
    """
    worker_id = uuid4()
    await _execute(database_url, A_WORKER, worker_id)
    running, _ = await _a_task(database_url), await _a_task(database_url)
    await _execute(database_url, RUN, running, worker_id)
    run("queue", "pause", "closed", "--force")

    listed = json.loads(run("queue", "list", "--json").stdout)["queues"]
    shown = run("queue", "list").stdout.splitlines()

    assert [("closed", 0, 0, 0, 0), ("default", 1, 1, 1, 10), ("mail", 0, 0, 1, 10)] == [
        (q["name"], q["waiting"], q["running"], q["workers"], q["slots"]) for q in listed
    ]
    assert [True, False, False] == [q["paused_at"] is not None for q in listed]
    assert [False, True, False] == [q["oldest_due_at"] is not None for q in listed]
    assert ["QUEUE", "closed", "default", "mail"] == [line.split()[0] for line in shown]


async def test_workers_are_listed_with_what_they_do(run: Run, database_url: str) -> None:
    """
    The list shows what each worker does, and marks one whose last heartbeat is older than its
    leases.
    """
    worker_id = uuid4()
    await _execute(database_url, A_WORKER, worker_id)
    await _execute(database_url, RUN, await _a_task(database_url), worker_id)
    alive = json.loads(run("worker", "list", "--json").stdout)["workers"]
    silence = "UPDATE asyncflow.workers SET heartbeat_at = now() - interval '1 hour'"
    await _execute(database_url, silence)
    shown = run("worker", "list").stdout

    assert [(str(worker_id), "host:7", ["default", "mail"], 1, 10, False)] == [
        (w["id"], w["name"], w["queues"], w["running"], w["slots"], w["is_overdue"]) for w in alive
    ]
    assert "dead or cut off" in shown


async def test_a_cancel_of_a_running_task_says_that_it_was_asked_for(
    run: Run, database_url: str
) -> None:
    """
    The output says that the cancellation was requested: the task is still RUNNING, as if nothing
    had happened.
    """
    task_id = await _a_task(database_url)
    await _execute(database_url, RUN, task_id, uuid4())

    shown = run("task", "cancel", task_id).stdout

    assert "RUNNING" in shown
    assert "its worker asks the handler to stop" in shown


async def test_a_traceback_reaches_a_pipe_line_by_line(run: Run, database_url: str) -> None:
    """
    The lines of a traceback are not wrapped to the width of a terminal.
    """
    frame = f'  File "{"deep/" * 40}tasks.py", line 7, in send'
    failure = {"kind": "ValueError", "message": "No.", "traceback": f"Traceback:\n{frame}\nNo."}
    task_id = await _a_task(database_url)
    await _execute(database_url, FAIL, task_id, json.dumps(failure))

    lines = run("task", "get", task_id).stdout.splitlines()

    assert frame.strip() in [line.strip() for line in lines]


def test_the_version_is_an_option_too(run: Run) -> None:
    """
    `asyncflow --version` prints the version, as is usual.
    """
    assert run("version").stdout == run("--version").stdout != ""


def test_psql_opens_in_the_schema_of_asyncflow(run: Run) -> None:
    """
    `psql` starts in AsyncFlow's schema. It gets the password in the environment, where other users
    cannot see it.
    """
    ended = run("psql", "-Atc", "SELECT count(*) FROM tasks")

    assert (0, "0\n") == (ended.returncode, ended.stdout)
