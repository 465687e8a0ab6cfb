"""
No part of a password is ever printed, wherever it stands in a URL.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncflow.cli.app import run_command
from asyncflow.errors import InvalidSettings
from asyncflow.settings import load_settings
from tests.support.programs import environment, finished

# Pieces that occur in no text of ours, separated by characters that delimit parts of a URL.
PIECES = st.text("QXZ7", min_size=3, max_size=6)
BETWEEN = st.text("@:/?#[]%&=+ ,;'\"\\~\t\N{FULLWIDTH COMMERCIAL AT}é\udcff", max_size=3)
PASSWORDS = st.lists(st.tuples(BETWEEN, PIECES), min_size=1, max_size=4).map(
    lambda pairs: "".join(between + piece for between, piece in pairs)
)
URLS = {
    "database_url": "postgresql://me:{}@127.0.0.1:1/db",
    "broker_url": "amqp://me:{}@127.0.0.1:1/",
}
COMMANDS = [
    ["api"],
    ["worker"],
    ["maintenance"],
    ["migrate"],
    ["dev"],
    ["doctor"],
    ["bench"],
    ["task", "list"],
    ["queue", "pause", "default"],
]


def said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """
    Run a command in this process; return its exit status and its output.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["asyncflow", *arguments])
        status = run_command()
    shown = capsys.readouterr()
    return status, shown.out + shown.err


def shows_nothing_of(password: str, output: str) -> bool:
    """
    Whether the output contains no part of the password.
    """
    return not any(piece in output for piece in re.findall("[QXZ7]{3,}", password))


@settings(max_examples=300)
@given(password=PASSWORDS, name=st.sampled_from(list(URLS)))
@example(password="QQQ@XXX:ZZZ/777", name="database_url")
@example(password="QQQ@XXX/ZZZ", name="broker_url")
def test_a_url_that_is_refused_shows_nothing_of_its_password(password: str, name: str) -> None:
    """
    The error for an invalid URL never shows the password, whatever characters it has.
    """
    given = {name: URLS[name].format(password)}
    try:
        load_settings(None, **given)
    except InvalidSettings as refusal:
        assert shows_nothing_of(password, str(refusal))
        assert name.upper() in str(refusal)


@settings(max_examples=60)
@given(password=PASSWORDS, command=st.sampled_from([["migrate"], ["task", "list"], ["doctor"]]))
def test_a_command_shows_nothing_of_a_password(password: str, command: list[str]) -> None:
    """
    No output shows the password, whether the command refuses the URL or cannot reach the server.
    """
    output = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        patch.setenv("ASYNCFLOW_DATABASE_URL", URLS["database_url"].format(password))
        patch.setattr("sys.argv", ["asyncflow", *command])
        status = run_command()

    assert status in (1, 2)
    assert output.getvalue()
    assert shows_nothing_of(password, output.getvalue())


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("name", URLS)
@pytest.mark.parametrize("place", ["environment", "file"])
def test_every_command_refuses_an_unclear_url(
    command: list[str],
    name: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """
    The exit status is 2, and one sentence is printed, whatever the source of the URL.
    """
    password = "QQQ@XXX:ZZZ/777"
    variable, url = f"ASYNCFLOW_{name.upper()}", URLS[name].format(password)
    monkeypatch.chdir(tmp_path)
    if place == "environment":
        monkeypatch.setenv(variable, url)
    else:
        (tmp_path / ".env").write_text(f"{variable}={url}\n")

    status, output = said(capsys, command)

    assert 2 == status
    assert shows_nothing_of(password, output)
    assert variable in output
    assert "percent-encoded" in output
    assert 1 == len(output.splitlines())


@pytest.mark.parametrize("name", URLS)
def test_dev_refuses_an_unclear_url_as_an_option(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    The option of `dev` is validated as strictly as the setting.
    """
    monkeypatch.chdir(tmp_path)
    url = URLS[name].format("QQQ@XXX:ZZZ/777")

    status, output = said(capsys, ["dev", f"--{name.replace('_', '-')}", url])

    assert 2 == status
    assert shows_nothing_of("QQQ XXX ZZZ 777", output)
    assert "percent-encoded" in output


@pytest.mark.parametrize("command", [["migrate"], ["task", "list"], ["doctor"]], ids=" ".join)
def test_a_server_that_is_away_shows_nothing_of_the_password(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    The URL is valid, but the connection fails; the error does not show the password.
    """
    monkeypatch.setenv("ASYNCFLOW_DATABASE_URL", URLS["database_url"].format("QQQ:XXX%40ZZZ"))

    status, output = said(capsys, command)

    assert status in (1, 2)
    assert shows_nothing_of("QQQ XXX ZZZ", output)


def test_nothing_is_shown_by_the_program_itself(tmp_path: Path) -> None:
    """
    The output of a real process, even a traceback, does not show the password.
    """
    env = environment(database_url=URLS["database_url"].format("QQQ@XXX:ZZZ/777"))

    ended = finished("migrate", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert shows_nothing_of("QQQ XXX ZZZ 777", ended.stdout + ended.stderr)


@pytest.mark.parametrize("password", ["QQQ@XXX/ZZZ", "QQQ:ZZZ"])
def test_verify_refuses_an_unclear_broker(
    password: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """
    The option is validated as strictly as the setting. Exit status 3 means that there was no run.
    """
    url = f"amqp://me:{password}" + ("@host/" if "@" in password else "")
    options = ["--engine", "rabbitmq", "--broker-url", url, "--output", str(tmp_path / "run")]

    status, output = said(capsys, ["verify", *options])

    assert 3 == status
    assert shows_nothing_of(password, output)
    assert "percent-encoded" in output
