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

from cli.programs import environment, finished

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
    The second run finds nothing to do and is no error.
    """
    env = environment(database_url=empty_database_url)

    first = finished("migrate", folder=tmp_path, env=env)
    second = finished("migrate", folder=tmp_path, env=env)

    assert (0, 0) == (first.returncode, second.returncode)
    assert "is now" in first.stdout
    assert "already" in second.stdout


async def test_a_task_is_shown_as_the_api_would(run: Run, database_url: str) -> None:
    """
    `--json` is the answer of GET /tasks/{id}.
    """
    task_id = await _a_task(database_url, payload='{"order": 7}')

    shown = json.loads(run("task", "get", task_id, "--json").stdout)

    assert task_id == shown["id"]
    assert shown["status"] == "PENDING"
    assert shown["payload"] == {"order": 7}


async def test_a_task_is_shown_for_people(run: Run, database_url: str) -> None:
    """
    With why it does not start.
    """
    task_id = await _a_task(database_url)

    shown = run("task", "get", task_id).stdout

    assert "PENDING" in shown
    assert "No live worker offers 'wait'" in " ".join(shown.split())


async def test_a_payload_cannot_steer_the_terminal(run: Run, database_url: str) -> None:
    """
    Control characters are replaced before they are shown.
    """
    task_id = await _a_task(database_url, payload='{"a": "\x9b31m"}')

    shown = run("task", "get", task_id).stdout

    assert "\x9b" not in shown


async def test_a_list_is_filtered_and_says_how_to_go_on(run: Run, database_url: str) -> None:
    """
    The printed cursor leads to the next page.
    """
    for name in ("wait", "wait", "wait", "other"):
        await _a_task(database_url, name=name)

    first = run("task", "list", "--name", "wait", "--limit", "2").stdout
    cursor = first.split("--cursor=")[1].strip()
    second = run("task", "list", "--name", "wait", "--status", "pending", "--cursor", cursor).stdout

    assert first.count("PENDING") == 2
    assert second.count("PENDING") == 1
    assert "other" not in first + second


async def test_a_task_is_cancelled_and_redriven(run: Run, database_url: str) -> None:
    """
    Both answer with the task as it is then.
    """
    task_id = await _a_task(database_url)

    cancelled = json.loads(run("task", "cancel", task_id, "--json").stdout)
    redriven = json.loads(run("task", "redrive", task_id, "--json").stdout)

    assert cancelled["status"] == "CANCELLED"
    assert (redriven["status"], redriven["generation"]) == ("PENDING", 2)


async def test_what_a_task_does_not_allow_is_a_sentence(run: Run, database_url: str) -> None:
    """
    It names the state and what would have worked.
    """
    task_id = await _a_task(database_url)

    ended = run("task", "redrive", task_id)

    assert ended.returncode == 2
    assert f"asyncflow: Task {task_id} is pending; only" in ended.stderr


def test_an_unknown_task_is_a_sentence(run: Run) -> None:
    """
    Not an empty page and not a traceback.
    """
    task_id = uuid4()

    ended = run("task", "get", str(task_id))

    assert (2, f"asyncflow: There is no task {task_id}.\n") == (ended.returncode, ended.stderr)


def test_an_unknown_status_is_answered_with_the_known_ones(run: Run) -> None:
    """
    Before the database is asked.
    """
    ended = run("task", "list", "--status", "lost")

    assert ended.returncode == 2
    assert "RETRYING" in ended.stderr


async def test_a_queue_is_paused_and_resumed(run: Run, database_url: str) -> None:
    """
    Its tasks say that they wait for it.
    """
    task_id = await _a_task(database_url)

    run("queue", "pause", "default")
    paused = json.loads(run("task", "get", task_id, "--json").stdout)
    resumed = run("queue", "resume", "default")

    assert "is paused" in paused["waiting_for"]
    assert resumed.returncode == 0
