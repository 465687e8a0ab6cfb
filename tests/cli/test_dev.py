"""
`asyncflow dev`: one command runs everything, and leaves nothing behind.
"""

from __future__ import annotations

import io
import json
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import click
import psutil
import pytest

from asyncflow.cli.app import FROM_SETTINGS
from asyncflow.cli.dev import chosen_servers
from asyncflow.errors import InvalidSettings
from asyncflow.settings import Settings
from tests.support.ports import free_port
from tests.support.programs import Program, environment, finished, running

STOP_LINE = r"^Stop +Ctrl-C"

ON_OUR_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "asyncflow", "dev"])
"""
"""Makes its standard input the session's terminal, as a shell in a window has it."""


@pytest.fixture
def port() -> int:
    """
    A free port.
    """
    return free_port()


@pytest.fixture
def env(port: int) -> dict[str, str]:
    """
    A newcomer's environment; only a port is set, so that tests can run concurrently.
    """
    return environment(api_port=port)


@pytest.fixture(scope="module")
def used_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    A folder in which `asyncflow dev` has run once, without a task. Tests copy it, because creating
    a database takes seconds.
    """
    folder = tmp_path_factory.mktemp("used")
    with running("dev", folder=folder, env=environment(api_port=free_port())) as dev:
        dev.until(STOP_LINE)
        dev.send(signal.SIGTERM)
        assert 0 == dev.ended()
    return folder


@pytest.fixture
def folder(used_folder: Path, tmp_path: Path) -> Path:
    """
    A copy of that folder.
    """
    subprocess.run(["cp", "-a", used_folder / ".asyncflow", tmp_path], check=True)
    return tmp_path


def submit(program: Program, payload: str = '{"seconds": 0}') -> str:
    """
    Run the banner's curl line with a payload, and return the task's id.
    """
    curl = shlex.split(program.until(r"^Try it +(curl .*)$")[1])
    curl[-1] = json.dumps({**json.loads(curl[-1]), "payload": json.loads(payload)})
    answer = subprocess.run([*curl, "--silent"], stdout=subprocess.PIPE, check=True)
    return str(json.loads(answer.stdout)["id"])


def test_the_line_to_try_works_and_data_survives_a_restart(
    env: dict[str, str], tmp_path: Path
) -> None:
    """
    The banner's command works, Ctrl-C leaves no process behind, and the task survives.
    """
    with running("dev", folder=tmp_path, env=env) as dev:
        dev.until(STOP_LINE)
        task_id = submit(dev)
        dev.until(f"attempt.settled.*{task_id}.*outcome=complete")
        dev.send(signal.SIGINT)

        assert 0 == dev.ended()
        assert [] == dev.survivors()

    with running("dev", folder=tmp_path, env=env) as dev:
        dev.until(STOP_LINE)
        shown = finished("task", "get", task_id, folder=tmp_path, env=env)

        assert "COMPLETED" in shown.stdout


def test_the_first_signal_lets_a_task_finish(env: dict[str, str], folder: Path) -> None:
    """
    After the first signal, a running task may finish within the grace period.
    """
    with running("dev", folder=folder, env=env) as dev:
        dev.until(STOP_LINE)
        _run_until_begun(dev, env, folder, seconds=2)
        dev.send(signal.SIGTERM)

        assert 0 == dev.ended()
        dev.until("attempt.settled.*outcome=complete")
        assert [] == dev.survivors()


def test_the_second_signal_gives_a_task_back(env: dict[str, str], folder: Path) -> None:
    """
    The second signal releases the task, without a failure.
    """
    with running("dev", folder=folder, env=env) as dev:
        dev.until(STOP_LINE)
        _run_until_begun(dev, env, folder, seconds=600)
        dev.send(signal.SIGINT)
        dev.until("process.stopping.*worker")
        dev.send_until(signal.SIGINT, "process.force_quit.*worker")

        assert 0 == dev.ended()
        dev.until("attempt.settled.*outcome=release")


def test_nothing_outlives_a_killed_parent(env: dict[str, str], folder: Path) -> None:
    """
    When the parent is killed, no child survives, not even PostgreSQL, and the next start works.
    """
    with running("dev", folder=folder, env=env) as dev:
        dev.until(STOP_LINE)
        dev.send(signal.SIGKILL)

        assert [] == dev.survivors()

    with running("dev", folder=folder, env=env) as dev:
        dev.until(STOP_LINE)


def test_a_killed_process_is_started_again(env: dict[str, str], folder: Path) -> None:
    """
    A killed process is restarted; one crash does not end `asyncflow dev`.
    """
    with running("dev", folder=folder, env=env) as dev:
        dev.until(STOP_LINE)
        dev.child("worker").kill()
        dev.until("process.died.*role=worker")
        task_id = submit(dev)

        dev.until(f"attempt.settled.*{task_id}.*outcome=complete")


def test_closing_the_terminal_stops_everything(env: dict[str, str], folder: Path) -> None:
    """
    SIGHUP counts as a request to stop, although there is no terminal to print to.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_OUR_TERMINAL],
        cwd=folder,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while b"Ctrl-C" not in said:
        said += os.read(ours, 4096)
    family = psutil.Process(process.pid).children(recursive=True)
    os.close(ours)

    assert 0 == process.wait(60)
    assert [] == psutil.wait_procs(family, timeout=60)[1]


def test_a_taken_port_stops_it_before_anything_is_started(
    env: dict[str, str], port: int, tmp_path: Path
) -> None:
    """
    With the port taken, one sentence is printed and no database folder is created.
    """
    with socket.create_server(("127.0.0.1", port)):
        ended = finished("dev", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert [] == list(tmp_path.iterdir())


def test_two_in_one_folder_do_not_share_a_database(env: dict[str, str], folder: Path) -> None:
    """
    The second process is refused with the pid of the first, which continues.
    """
    with running("dev", folder=folder, env=env) as dev:
        dev.until(STOP_LINE)
        ended = finished("dev", "--port", str(free_port()), folder=folder, env=env)

        assert 2 == ended.returncode
        assert f"already in use by process {dev.process.pid}" in ended.stderr
        task_id = submit(dev)
        dev.until(f"attempt.settled.*{task_id}.*outcome=complete")


def test_a_file_in_place_of_the_data_folder_is_a_sentence(
    env: dict[str, str], tmp_path: Path
) -> None:
    """
    One sentence is printed, with the setting that would help.
    """
    (tmp_path / ".asyncflow").touch()

    ended = finished("dev", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert "ASYNCFLOW_DATA_FOLDER" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_data_folder_that_is_no_database_is_a_sentence(
    env: dict[str, str], tmp_path: Path
) -> None:
    """
    A data folder that holds no database is refused in one sentence that names the folder.
    """
    data = tmp_path / ".asyncflow" / "postgres" / "data"
    data.mkdir(parents=True)

    ended = finished("dev", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert str(data.parent) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_missing_module_of_handlers_stops_everything(env: dict[str, str], folder: Path) -> None:
    """
    With a missing module everything stops, and the worker's error is printed.
    """
    with running("dev", "--handlers", "nowhere.tasks", folder=folder, env=env) as dev:
        assert 2 == dev.ended()
        dev.until("No module named 'nowhere.tasks'")
        assert [] == dev.survivors()


def test_handlers_of_the_current_folder_run(env: dict[str, str], folder: Path) -> None:
    """
    Handlers are loaded from the current folder; `.env` names the module, as in a project.
    """
    (folder / "tasks.py").write_text(
        "import asyncflow\n\n\n@asyncflow.handler\ndef greet(seconds: int) -> str:\n"
        "    return 'hello'\n"
    )
    (folder / ".env").write_text("ASYNCFLOW_WORKER_HANDLERS=tasks\n")

    with running("dev", folder=folder, env=env) as dev:
        dev.until("process.started.*handlers=2")


NOBODY_LISTENS = "postgresql://me:very-secret@127.0.0.1:1/production"
NO_BROKER = "amqp://me:very-secret@127.0.0.1:1/"


def test_servers_that_are_set_are_left_alone(env: dict[str, str], folder: Path) -> None:
    """
    Configured servers may be production's: dev says that it uses its own database and no broker.
    """
    env = {**env, "ASYNCFLOW_DATABASE_URL": NOBODY_LISTENS}
    (folder / ".env").write_text(
        f"ASYNCFLOW_BROKER_URL={NO_BROKER}\nASYNCFLOW_DATABASE_POOLER=true\n"
    )

    with running("dev", folder=folder, env=env) as dev:
        dev.until("ASYNCFLOW_DATABASE_URL is set but ignored here; use it with --database-url.")
        dev.until("ASYNCFLOW_BROKER_URL is set but ignored here; use it with --broker-url.")
        dev.until("process.started.*worker_id=.*broker=none")
        dev.until("^Data .*embedded PostgreSQL")
        task_id = submit(dev)
        dev.until(f"attempt.settled.*{task_id}.*outcome=complete")

        assert "very-secret" not in dev.output


def test_a_database_that_is_typed_is_used_and_left_running(
    env: dict[str, str], empty_database_url: str, tmp_path: Path
) -> None:
    """
    A database given on the command line is migrated, used and named in the banner, and nothing is
    stored in the folder.
    """
    env = {**env, "ASYNCFLOW_DATABASE_URL": NOBODY_LISTENS}

    with running("dev", "--database-url", empty_database_url, folder=tmp_path, env=env) as dev:
        dev.until(r"^Data .*--database-url")
        task_id = submit(dev)
        dev.until(f"attempt.settled.*{task_id}.*outcome=complete")
        dev.send(signal.SIGTERM)

        assert 0 == dev.ended()
        assert not (tmp_path / ".asyncflow").exists()


SET = Settings(database_url=NOBODY_LISTENS, broker_url=NO_BROKER, database_pooler=True)


@pytest.mark.parametrize(
    ("typed_database", "typed_broker", "expected"),
    [
        (None, None, (None, None, False)),
        (None, FROM_SETTINGS, (None, NO_BROKER, False)),
        # One installation: its broker is used, too.
        (FROM_SETTINGS, None, (NOBODY_LISTENS, NO_BROKER, True)),
        # An explicit URL is in the settings already.
        (NOBODY_LISTENS, None, (NOBODY_LISTENS, None, True)),
        (NOBODY_LISTENS, NO_BROKER, (NOBODY_LISTENS, NO_BROKER, True)),
    ],
)
def test_only_servers_that_were_asked_for_are_used(
    typed_database: str | None, typed_broker: str | None, expected: tuple[object, ...]
) -> None:
    """
    Each server has its own option; the database's option without a URL selects both configured
    servers.
    """
    chosen = chosen_servers(SET, database=typed_database, broker=typed_broker, confirmed=True)

    assert expected == (chosen.database_url, chosen.broker_url, chosen.database_pooler)


def test_the_database_of_the_settings_needs_a_yes(env: dict[str, str], tmp_path: Path) -> None:
    """
    Without a terminal and `--yes`, dev refuses and says what it would have done.
    """
    env = {**env, "ASYNCFLOW_DATABASE_URL": NOBODY_LISTENS}

    ended = finished("dev", "--database-url", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert "would migrate postgresql://me:***@127.0.0.1:1/production" in ended.stderr
    assert "--yes" in ended.stderr


@pytest.mark.parametrize("answer", ["y\n", "n\n", "\n"])
def test_at_a_terminal_the_database_of_the_settings_is_asked_for(
    answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    At a terminal dev asks, and any answer but yes ends it before anything is done.
    """
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)

    def choose() -> Settings:
        return chosen_servers(SET, database=FROM_SETTINGS, broker=None, confirmed=False)

    if answer == "y\n":
        assert choose() == SET
    else:
        with pytest.raises(click.Abort):
            choose()
    assert "This will migrate postgresql://me:***@" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed_database", "typed_broker", "variable"),
    [(FROM_SETTINGS, None, "DATABASE_URL"), (None, FROM_SETTINGS, "BROKER_URL")],
)
def test_an_option_without_a_url_needs_the_setting(
    typed_database: str | None, typed_broker: str | None, variable: str
) -> None:
    """
    An option without a URL is refused if the setting is missing: there is no server to use.
    """
    with pytest.raises(InvalidSettings, match=f"ASYNCFLOW_{variable}"):
        chosen_servers(Settings(), database=typed_database, broker=typed_broker, confirmed=True)


def _run_until_begun(dev: Program, env: dict[str, str], folder: Path, *, seconds: int) -> None:
    task_id = submit(dev, f'{{"seconds": {seconds}}}')
    begun = threading.Event()
    while not begun.wait(0.05):
        shown = finished("task", "get", task_id, "--json", folder=folder, env=env)
        if json.loads(shown.stdout)["status"] == "RUNNING":
            begun.set()
