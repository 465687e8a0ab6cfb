"""
A command that cannot work ends with one sentence and an exit status, never a traceback.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.support.programs import environment, finished, running

NOBODY_LISTENS = "postgresql://someone:very-secret@127.0.0.1:1/none"


@pytest.fixture
def taken_port() -> Iterator[int]:
    """
    A port that is in use.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", ["api", "worker", "maintenance", "migrate"])
def test_without_a_database_url_a_process_says_what_to_set(command: str, tmp_path: Path) -> None:
    """
    The error, the first that a newcomer sees, names the variable and gives an example.
    """
    ended = finished(command, folder=tmp_path, env=environment())

    assert 2 == ended.returncode
    assert ended.stderr.startswith("asyncflow: ASYNCFLOW_DATABASE_URL is not set;")
    assert "Traceback" not in ended.stderr


def test_all_wrong_settings_are_named_together(tmp_path: Path) -> None:
    """
    All mistakes are reported together, so three mistakes do not take three starts.
    """
    env = environment(api_port="http", log_level="loud", database_url="mysql://host/name")

    ended = finished("api", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    for name in ("API_PORT", "LOG_LEVEL", "DATABASE_URL"):
        assert f"  ASYNCFLOW_{name}: " in ended.stderr


def test_a_wrong_setting_does_not_show_its_value(tmp_path: Path) -> None:
    """
    The value is not printed, because a URL may contain a password.
    """
    env = environment(database_url="mysql://someone:very-secret@host/name")

    ended = finished("api", folder=tmp_path, env=env)

    assert "very-secret" not in ended.stderr


def test_settings_are_read_from_a_file_in_the_current_folder(tmp_path: Path) -> None:
    """
    `.env` applies where the environment sets nothing.
    """
    (tmp_path / ".env").write_text("ASYNCFLOW_WORKER_SLOTS=0\n")

    ended = finished("worker", folder=tmp_path, env=environment())

    assert ended.stderr.startswith("asyncflow: ASYNCFLOW_WORKER_SLOTS: ")


def test_an_option_wins_over_the_environment(tmp_path: Path) -> None:
    """
    An option overrides the environment.
    """
    env = environment(api_port=80_000)

    ended = finished("worker", "--slots", "0", folder=tmp_path, env=env)

    assert "  --slots: must be" in ended.stderr


def test_a_database_that_cannot_be_reached_is_worth_another_try(tmp_path: Path) -> None:
    """
    The exit status is 1, because the same command may work later; the password stays hidden.
    """
    ended = finished("migrate", folder=tmp_path, env=environment(database_url=NOBODY_LISTENS))

    assert 1 == ended.returncode
    assert ended.stderr.startswith("asyncflow: PostgreSQL cannot serve now: ")
    assert "very-secret" not in ended.stderr


@pytest.mark.parametrize("command", ["api", "worker", "maintenance"])
def test_a_process_refuses_a_database_without_schema(
    command: str, empty_database_url: str, tmp_path: Path
) -> None:
    """
    A process refuses a database without the schema and says how to create it.
    """
    env = environment(database_url=empty_database_url, api_port=free_port())

    ended = finished(command, folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert "has no AsyncFlow schema. Run `asyncflow migrate`" in ended.stderr


def test_a_taken_port_is_named_and_the_way_out_too(
    taken_port: int, database_url: str, tmp_path: Path
) -> None:
    """
    The sentence names the address and how to choose another.
    """
    env = environment(database_url=database_url)

    ended = finished("api", "--port", str(taken_port), folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert f"cannot listen on 127.0.0.1:{taken_port}" in ended.stderr
    assert "--port" in ended.stderr


def test_a_missing_module_of_handlers_is_named(database_url: str, tmp_path: Path) -> None:
    """
    The error names the missing module and where the worker searched for it.
    """
    env = environment(database_url=database_url)

    ended = finished("worker", "--handlers", "nowhere.tasks", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert "No module named 'nowhere.tasks'. Searched in:" in ended.stderr
    assert str(tmp_path) in ended.stderr


def test_a_mistyped_command_is_answered_with_the_right_one(tmp_path: Path) -> None:
    """
    The error suggests the command that was meant.
    """
    ended = finished("wroker", folder=tmp_path, env=environment())

    assert 2 == ended.returncode
    assert "Did you mean 'worker'?" in ended.stderr


def test_a_handler_with_a_type_json_cannot_fill_is_named_before_the_worker_starts(
    database_url: str, tmp_path: Path
) -> None:
    """
    One sentence names file, function and parameter, and a supervisor does not restart the worker.
    """
    (tmp_path / "tasks.py").write_text(
        "import asyncflow\nclass Plain: ...\n@asyncflow.handler\ndef mail(to: Plain): ...\n"
    )
    env = environment(database_url=database_url)

    ended = finished("worker", "--handlers", "tasks", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert "process.started" not in ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"asyncflow: Handler 'mail' (mail in {tmp_path}/tasks.py, line 3): parameter 'to': no JSON"
    )


def test_a_module_of_handlers_may_run_a_loop_of_its_own_while_it_is_imported(
    database_url: str, tmp_path: Path
) -> None:
    """
    A module may run an event loop on import: handlers are loaded before the worker's own loop
    exists.
    """
    (tmp_path / "tasks.py").write_text(
        "import asyncio, asyncflow\nasync def settings(): return 'mail'\n"
        "@asyncflow.handler(asyncio.run(settings()))\ndef mail(): ...\n"
    )
    env = environment(database_url=database_url)

    with running("worker", "--handlers", "tasks", folder=tmp_path, env=env) as worker:
        worker.until("process.started")
        worker.send(signal.SIGTERM)
        assert 0 == worker.ended()


def test_a_handler_whose_queue_a_worker_does_not_take_is_named_at_its_start(
    database_url: str, tmp_path: Path
) -> None:
    """
    The worker warns of a handler whose queue it does not serve, because its tasks may never run.
    The built-in handler is not reported.
    """
    (tmp_path / "tasks.py").write_text(
        "import asyncflow\n@asyncflow.handler(queue='reports')\ndef monthly(): ...\n"
    )
    env = environment(database_url=database_url, log_format="json")

    with running(
        *("worker", "--handlers", "tasks", "--queues", "mail"), folder=tmp_path, env=env
    ) as worker:
        line = json.loads(worker.until("handler.not_taken").string)
        worker.send(signal.SIGTERM)
        assert 0 == worker.ended()

    assert ("monthly", "reports", "mail") == (line["name"], line["queue"], line["queues"])
    assert 1 == worker.output.count("handler.not_taken")
