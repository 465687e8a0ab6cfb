"""
Settings are read once and validated; errors name the setting.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from asyncflow.errors import InvalidSettings
from asyncflow.processes.supervisor import as_environment
from asyncflow.settings import PREFIX, load_settings, required_database_url, unknown_variables


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """
    An environment without settings, and an empty working folder for a `.env`.
    """
    for name in os.environ:
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[str]:
    """
    The error for an invalid environment.
    """
    for name, value in environment.items():
        monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(InvalidSettings) as refusal:
        load_settings()
    return list(refusal.value.mistakes)


def test_everything_has_a_default() -> None:
    """
    Every setting has a default, so a newcomer need not set anything.
    """
    settings = load_settings()

    assert settings.database_url is None
    assert settings.broker_url is None
    assert ("127.0.0.1", 3000) == (settings.api_host, settings.api_port)


def test_the_environment_wins_over_the_file_and_the_caller_over_both(
    monkeypatch: pytest.MonkeyPatch, bare_environment: Path
) -> None:
    """
    The order of precedence is command line, environment, `.env`, default.
    """
    (bare_environment / ".env").write_text(
        f"{PREFIX}API_PORT=1\n{PREFIX}WORKER_SLOTS=2\n{PREFIX}RETENTION_DAYS=3\nOTHER=x\n"
    )
    monkeypatch.setenv(f"{PREFIX}API_PORT", "10")
    monkeypatch.setenv(f"{PREFIX}WORKER_SLOTS", "20")

    settings = load_settings(api_port=100, worker_slots=None)

    assert (100, 20, 3.0) == (
        settings.api_port,
        settings.worker_slots,
        settings.retention_days,
    )


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    An empty variable counts as not set, because Compose files write unset ones like that.
    """
    monkeypatch.setenv(f"{PREFIX}DATABASE_URL", "")
    monkeypatch.setenv(f"{PREFIX}API_PORT", "")

    settings = load_settings()

    assert (None, 3000) == (settings.database_url, settings.api_port)


@pytest.mark.parametrize(
    ("text", "expected"), [("a", ("a",)), ("a,b", ("a", "b")), (" a , ,b,a", ("a", "b")), (",", ())]
)
def test_names_are_a_comma_separated_list(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[str, ...]
) -> None:
    """
    Names are separated by commas; spaces, empty parts and repetitions are ignored.
    """
    monkeypatch.setenv(f"{PREFIX}WORKER_QUEUES", text)

    assert expected == load_settings().worker_queues


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORKER_QUEUES", "mail,a b"),
        ("WORKER_QUEUES", "x" * 129),
        ("API_PORT", "0"),
        ("API_PORT", "65536"),
        ("API_PORT", "http"),
        ("DATABASE_POOL_SIZE", "1"),
        ("DATABASE_URL", "mysql://host/db"),
        ("BROKER_URL", "http://host"),
        ("WORKER_SLOTS", "0"),
        ("LEASE_SECONDS", "nan"),
        ("HEARTBEAT_SECONDS", "0"),
        ("RETENTION_DAYS", "-1"),
        ("LOG_LEVEL", "loud"),
        ("DATABASE_POOLER", "perhaps"),
        ("WORKER_PROCESSES", "1.5"),
        ("LOG_FORMAT", "xml"),
        ("API_HOSTS", "https://tasks.example.com"),
        ("API_HOSTS", "tasks.example.com:443"),
        ("API_HOSTS", "a,b c"),
        ("API_HOSTS", "*.example.com"),
        ("API_ROOT_PATH", "asyncflow"),
        ("API_ROOT_PATH", "/a//b"),
        ("API_ROOT_PATH", "/a/../b"),
        ("API_ROOT_PATH", "/ä"),
        ("API_ROOT_PATH", "https://host/a"),
        ("API_CORS_ORIGINS", "app.example.com"),
        ("API_CORS_ORIGINS", "https://app.example.com/"),
        ("API_CORS_ORIGINS", "https://a.example,null"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """
    A wrong value is reported in one sentence that names the variable.
    """
    (sentence,) = complaint(monkeypatch, **{name: value})

    assert sentence.startswith(f"{PREFIX}{name}: ")
    assert sentence.endswith(".")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("API_PORT", "http", "must be a whole number from 1 to 65535."),
        ("LEASE_SECONDS", "inf", "must be a number from 0.5 to 3600."),
        ("DATABASE_POOLER", "2", "must be true or false."),
        ("LOG_LEVEL", "loud", "must be debug, info, warning or error."),
        ("BROKER_URL", "http://host", "must begin with amqp:// or amqps://."),
        (
            "API_HOSTS",
            "http://me:s3cret@host",
            (
                "must be names or IP addresses without scheme and port, such as "
                "tasks.example.com, or * for any."
            ),
        ),
        (
            "API_CORS_ORIGINS",
            "http://me:s3cret@host",
            (
                "must be origins, scheme and host without a path, such as "
                "https://app.example.com, or * for any."
            ),
        ),
        (
            "DATABASE_URL",
            "postgresql://me:s3cret@[host/db",
            (
                "must look like postgresql://user:password@host:port/name, with special "
                "characters in user, password and name percent-encoded, such as %40 for @ and %2F "
                "for /."
            ),
        ),
    ],
)
def test_a_complaint_says_what_would_have_worked(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    """
    The error says what is valid and does not repeat the value.
    """
    assert [f"{PREFIX}{name}: {sentence}"] == complaint(monkeypatch, **{name: value})


def test_hosts_and_origins_are_comma_separated_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Names, addresses of both families, and origins with and without a port are accepted.
    """
    monkeypatch.setenv(f"{PREFIX}API_HOSTS", "tasks.example.com., api, 10.0.0.5,fd00::5,[::1],*")
    monkeypatch.setenv(f"{PREFIX}API_CORS_ORIGINS", "https://a.example,http://[::1]:8080, *")

    settings = load_settings()

    assert ("tasks.example.com.", "api", "10.0.0.5", "fd00::5", "[::1]", "*") == settings.api_hosts
    assert ("https://a.example", "http://[::1]:8080", "*") == settings.api_cors_origins


@pytest.mark.parametrize(
    ("text", "expected"), [("/", ""), ("/a", "/a"), ("/a/", "/a"), ("/a.b/~c_1", "/a.b/~c_1")]
)
def test_a_root_path_has_no_slash_at_its_end(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    """
    A trailing slash is removed, so the root path can be put in front of any path; a slash alone
    means no root path.
    """
    monkeypatch.setenv(f"{PREFIX}API_ROOT_PATH", text)

    assert expected == load_settings().api_root_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [("true", True), ("1", True), ("Yes", True), ("on", True), ("FALSE", False), ("0", False)],
)
def test_yes_and_no_have_many_words(
    monkeypatch: pytest.MonkeyPatch, text: str, expected: bool
) -> None:
    """
    Booleans accept the usual words, in any case.
    """
    monkeypatch.setenv(f"{PREFIX}DATABASE_POOLER", text)

    assert expected is load_settings().database_pooler


def test_a_file_may_quote_comment_and_export(bare_environment: Path) -> None:
    """
    `.env` may contain quotes, comments and `export`, as other programs write it; names may be in
    any case.
    """
    (bare_environment / ".env").write_text(
        f"# Ours\nexport {PREFIX}API_HOST='::1' # all\n{PREFIX.lower()}log_level=\"DEBUG\"\n"
        f"{PREFIX}API_PORT=\n"
    )

    settings = load_settings()

    assert ("::1", "debug", 3000) == (settings.api_host, settings.log_level, settings.api_port)


def test_children_are_given_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A child gets the same settings, whether they come from options, variables or defaults.
    """
    monkeypatch.setenv(f"{PREFIX}WORKER_SLOTS", "20")
    chosen = load_settings(
        worker_slots=10, database_pooler=True, worker_handlers=("a", "b"), log_format="json"
    )

    for name, value in as_environment(chosen).items():
        monkeypatch.setenv(name, value)

    assert chosen == load_settings()


def test_all_mistakes_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    All mistakes are reported together, so three mistakes do not take three starts.
    """
    mistakes = complaint(monkeypatch, API_PORT="x", LOG_LEVEL="y", RETENTION_DAYS="z")

    assert ["API_PORT", "RETENTION_DAYS", "LOG_LEVEL"] == [
        m.partition(":")[0].removeprefix(PREFIX) for m in mistakes
    ]


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        (
            {"LEASE_SECONDS": "2.9", "HEARTBEAT_SECONDS": "1"},
            ["LEASE_SECONDS", "HEARTBEAT_SECONDS"],
        ),
        (
            {"PAYLOAD_BYTES_MAX": "4096", "API_BODY_BYTES_MAX": "4095"},
            ["PAYLOAD_BYTES_MAX", "API_BODY_BYTES_MAX"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], names: list[str]
) -> None:
    """
    Contradicting settings are refused, and the error names both.
    """
    (sentence,) = complaint(monkeypatch, **environment)

    assert all(f"{PREFIX}{name}=" in sentence for name in names)


def test_a_password_is_never_part_of_a_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Errors never contain a password, because they end up in logs.
    """
    mistakes = complaint(
        monkeypatch, DATABASE_URL="mysql://me:s3cret@host/db", BROKER_URL="me:s3cret@host"
    )

    assert 2 == len(mistakes)
    assert "s3cret" not in " ".join(mistakes)


def test_a_missing_database_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The error says what to set, and that `asyncflow dev` needs no database.
    """
    with pytest.raises(InvalidSettings, match=r"DATABASE_URL is not set.*asyncflow dev"):
        required_database_url(load_settings())

    assert "postgresql://host/db" == required_database_url(
        load_settings(database_url="postgresql://host/db")
    )


def test_settings_cannot_be_changed_after_they_were_read() -> None:
    """
    Settings are immutable, so every part of a process sees the same ones.
    """
    settings: Any = load_settings()

    with pytest.raises(AttributeError, match="api_port"):
        settings.api_port = 1


def test_a_misspelt_setting_is_refused_with_the_right_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A misspelt setting, which would silently have no effect, is refused with the right name.
    """
    (mistake,) = complaint(monkeypatch, WORKER_PROCESES="50")

    assert mistake == (
        "ASYNCFLOW_WORKER_PROCESES is not a setting; did you mean ASYNCFLOW_WORKER_PROCESSES?"
    )


@pytest.mark.parametrize("name", ["WORKER_CONCURRENCY", "WORKER_CONCURENCY"])
def test_a_word_of_other_systems_is_refused_with_ours(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """
    The term of another system is refused with ours: what others call concurrency is a worker's
    slots.
    """
    (mistake,) = complaint(monkeypatch, **{name: "50"})

    assert mistake == f"ASYNCFLOW_{name} is not a setting; did you mean ASYNCFLOW_WORKER_SLOTS?"


@pytest.mark.parametrize("name", ["CONCURRENCY", "SHARDS"])
def test_an_unknown_variable_is_reported_and_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """
    An unknown variable is only a warning: after a rollback the environment may hold settings of the
    newer version.
    """
    monkeypatch.setenv(PREFIX + name, "7")

    load_settings()

    assert [PREFIX + name] == unknown_variables()


@pytest.mark.parametrize(
    "name", ["SERVICE_HOST", "API_SERVICE_PORT_HTTP", "PORT_3000_TCP_ADDR", "PYTHON"]
)
def test_what_kubernetes_and_our_scripts_set_is_not_reported(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """
    Variables that Kubernetes and our scripts set are not reported: users did not set them and
    cannot change them.
    """
    monkeypatch.setenv(PREFIX + name, "10.0.0.7")

    assert [] == unknown_variables()


def test_a_port_from_kubernetes_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The error explains a variable that a Service named asyncflow-api puts into every pod of its
    namespace.
    """
    (mistake,) = complaint(monkeypatch, API_PORT="tcp://10.0.0.7:3000")

    assert "enableServiceLinks: false" in mistake


def test_mistakes_and_contradictions_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Mistakes and contradictions are reported together, so finding both does not take two starts.
    """
    mistakes = complaint(monkeypatch, API_PORT="http", HEARTBEAT_SECONDS="10", LEASE_SECONDS="11")

    assert ["ASYNCFLOW_API_PORT", "ASYNCFLOW_LEASE_SECONDS"] == [
        mistake.split(":")[0].split("=")[0] for mistake in mistakes
    ]


def test_a_contradiction_is_not_made_up_from_a_value_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    An unreadable value contradicts nothing: its default is not what the user set.
    """
    mistakes = complaint(monkeypatch, HEARTBEAT_SECONDS="often", LEASE_SECONDS="0.6")

    assert 1 == len(mistakes)


def test_a_wrong_option_is_named_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The error names the option as it was typed, not the valid variable in the environment.
    """
    monkeypatch.setenv(f"{PREFIX}WORKER_SLOTS", "5")

    with pytest.raises(InvalidSettings) as refusal:
        load_settings({"worker_slots": "--slots"}, worker_slots=0)

    assert ["--slots: must be a whole number from 1 to 10000."] == [*refusal.value.mistakes]
