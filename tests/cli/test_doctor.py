"""
`asyncflow doctor` says what is wrong with the servers, and how to fix it.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.programs import environment, finished


def test_a_good_server_is_told_to_be_good(database_url: str, tmp_path: Path) -> None:
    """
    With healthy servers one line per check is printed, and the exit status is 0.
    """
    ended = finished("doctor", folder=tmp_path, env=environment(database_url=database_url))

    assert 0 == ended.returncode
    assert "ok        PostgreSQL encoding: " in ended.stdout
    doubtful = [line for line in ended.stdout.splitlines() if line.startswith("doubtful ")]
    assert "wrong" not in ended.stdout
    assert ["doubtful  AsyncFlow maintenance: No maintenance process is running."] == doubtful


def test_what_is_wrong_is_named_with_its_mend(empty_database_url: str, tmp_path: Path) -> None:
    """
    A failed check is printed with its fix, the other checks still run, and the exit status is 2.
    """
    env = environment(database_url=empty_database_url)

    ended = finished("doctor", "--json", folder=tmp_path, env=env)

    findings = [json.loads(line) for line in ended.stdout.splitlines()]
    assert 2 == ended.returncode
    assert ["PostgreSQL schema"] == [f["what"] for f in findings if f["verdict"] == "wrong"]
    (schema,) = [f for f in findings if f["what"] == "PostgreSQL schema"]
    assert "asyncflow migrate" in schema["remedy"]
    assert len(findings) > 10


def test_a_server_that_is_away_is_wrong(tmp_path: Path) -> None:
    """
    An unreachable server is a failed check; neither a traceback nor the password is printed.
    """
    env = environment(database_url="postgresql://someone:very-secret@127.0.0.1:1/none")

    ended = finished("doctor", folder=tmp_path, env=env)

    assert 2 == ended.returncode
    assert ended.stdout.startswith("wrong     PostgreSQL connection: ")
    assert "very-secret" not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def test_rabbitmq_is_looked_at_where_it_is_set(
    database_url: str, broker_url: str, tmp_path: Path
) -> None:
    """
    RabbitMQ is checked if it is configured; a missing virtual host is named.
    """
    env = environment(database_url=database_url, broker_url=broker_url)
    good = finished("doctor", folder=tmp_path, env=env)
    env = environment(database_url=database_url, broker_url=f"{broker_url}-missing")
    bad = finished("doctor", folder=tmp_path, env=env)

    assert (0, 2) == (good.returncode, bad.returncode)
    assert "ok        RabbitMQ permissions: " in good.stdout
    assert "ok        RabbitMQ sharing: " in good.stdout
    assert "wrong     RabbitMQ virtual host: " in bad.stdout
    assert "rabbitmqctl add_vhost" in bad.stdout
