"""
A pytest plugin: which tests run, and on which versions of the servers.

By default a test runs on the newest supported PostgreSQL and the oldest supported RabbitMQ. Tests
under tests/store also run on the oldest PostgreSQL, except those marked `any_postgres`; those
marked `oldest_postgres` run only on that. Tests marked `every_rabbitmq` also run on the newest
RabbitMQ, except those in such a module that are marked `any_rabbitmq`.

`--quick` runs the most informative tests in about a minute: those that need no server, and those of
the store and the API, on one PostgreSQL. The two lists below say what it leaves out.

The last lines of the output say what was not run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import fetch, pgbouncer, postgres, rabbitmq

TESTS = Path(__file__).parents[1]
ON_EVERY_POSTGRES = TESTS / "store"

# With `--quick`, the folders whose tests may use PostgreSQL.
QUICK_ON_POSTGRES = ("store", "api")

NOT_QUICK = (
    "acceptance",
    "cli",
    "embedded",
    "faults",
    "model",
    "verify",
    "api/test_behind_proxies.py",
    "api/test_fuzz.py",
    "api/test_raw_requests.py",
    "api/test_slow_sockets.py",
    "api/test_torture.py",
    "store/test_lock_order.py",
    "store/test_model.py",
    "worker/test_garbage.py",
    "worker/test_isolation.py",
    "worker/test_nursery.py",
)
"""Folders and files that `--quick` leaves out: whole systems, children, thousands of cases."""

SLOW = (
    "api/test_server.py::test_an_idle_connection_is_kept_as_long_as_it_is_set",
    "store/test_cancel.py::test_of_a_cancellation_and_an_attempt_that_race_one_wins",
    "store/test_columns.py::test_a_nullable_column_is_added_in_four_places",
    "store/test_database.py::test_connections_that_a_firewall_forgot_cost_one_timeout",
    "telemetry/test_logs.py::test_a_process_outlives_a_pipe_that_nobody_reads",
    "transport/test_amqp_frames.py::test_a_stream_cut_anywhere_gives_the_same_events",
)
"""Single tests that `--quick` leaves out, because each takes seconds."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres",
        choices=[*postgres.MAJORS, "both"],
        help="run every test on this major version of PostgreSQL",
    )
    parser.addoption(
        "--rabbitmq",
        choices=[*rabbitmq.VERSIONS, "both"],
        help="run every test on this version of RabbitMQ",
    )
    parser.addoption(
        "--without-rabbitmq",
        action="store_true",
        help="skip the tests that need RabbitMQ",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="run the tests that need no server, and the store and the API on one PostgreSQL",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "oldest_postgres: run on the oldest supported version")
    config.addinivalue_line("markers", "every_rabbitmq: run on each supported version of RabbitMQ")
    config.addinivalue_line("markers", "any_rabbitmq: one version of RabbitMQ is enough")
    config.addinivalue_line("markers", "any_postgres: one version of PostgreSQL is enough")
    if config.option.quick:
        config.option.postgres = config.option.postgres or postgres.EMBEDDED
        config.option.without_rabbitmq = True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    left_out = config.option.quick and collection_path in [TESTS / name for name in NOT_QUICK]
    return True if left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        left_out = [item for item in items if not _is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_quick(item: pytest.Item) -> bool:
    folder, _, rest = str(item.path.relative_to(TESTS)).partition("/")
    fixtures = item.fixturenames if isinstance(item, pytest.Function) else []
    if "broker" in fixtures or ("postgres_server" in fixtures and folder not in QUICK_ON_POSTGRES):
        return False
    return f"{folder}/{rest}::{item.name.partition('[')[0]}" not in SLOW


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    def is_marked(name: str) -> bool:
        return metafunc.definition.get_closest_marker(name) is not None

    if "postgres_server" in metafunc.fixturenames:
        on_every = metafunc.definition.path.is_relative_to(ON_EVERY_POSTGRES)
        on_every = on_every and not is_marked("any_postgres")
        one = postgres.OLDEST if is_marked("oldest_postgres") else postgres.EMBEDDED
        default = "both" if on_every else one
        chosen = metafunc.config.getoption("--postgres") or default
        _parametrize(metafunc, "postgres_server", postgres.MAJORS, chosen)
    if "broker" in metafunc.fixturenames:
        on_every = is_marked("every_rabbitmq") and not is_marked("any_rabbitmq")
        default = "both" if on_every else rabbitmq.OLDEST
        chosen = metafunc.config.getoption("--rabbitmq") or default
        _parametrize(metafunc, "broker", rabbitmq.VERSIONS, chosen)


def _parametrize(
    metafunc: pytest.Metafunc, fixture: str, versions: Sequence[str], chosen: str
) -> None:
    run = [version for version in versions if chosen in (version, "both")]
    ids = [f"{fixture.removesuffix('_server')}-{version}" for version in run]
    metafunc.parametrize(fixture, run, ids=ids, indirect=True, scope="session")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    # With pytest-xdist each worker process collects the tests for itself, and has no terminal to
    # report to.
    if session.config.getoption("numprocesses"):
        majors = _chosen(session, "--postgres", postgres.MAJORS)
        versions = _chosen(session, "--rabbitmq", rabbitmq.VERSIONS)
        in_full = not session.config.option.quick
        _provide(session, majors, versions, with_pgbouncer=True, with_proxies=in_full)


def pytest_collection_finish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        majors = _versions(session, postgres.MAJORS, "postgres_server")
        versions = _versions(session, rabbitmq.VERSIONS, "broker", "engine")
        _provide(
            session,
            majors,
            versions,
            with_pgbouncer=_is_used(session, "pooler"),
            with_proxies=_is_used(session, "web_proxy"),
        )


def _provide(
    session: pytest.Session,
    majors: Sequence[str],
    versions: Sequence[str],
    *,
    with_pgbouncer: bool,
    with_proxies: bool,
) -> None:
    # A skip is acceptable on a laptop, but would hide a gap in CI and in bin/test.
    is_everything_wanted = "true" in (os.environ.get("CI"), os.environ.get("ASYNCFLOW_TEST_ALL"))
    if not is_everything_wanted or session.config.getoption("collectonly"):
        return
    if session.config.getoption("--without-rabbitmq"):
        versions = []
    fetch.fetch(
        majors,
        versions,
        with_pgbouncer=with_pgbouncer,
        with_proxies=with_proxies,
        say=_say_to(session),
    )
    lacking = postgres.missing(majors) + rabbitmq.missing(versions)
    if with_pgbouncer:
        lacking += pgbouncer.missing()
    if lacking:
        raise pytest.UsageError("\n".join(lacking))


def _chosen(session: pytest.Session, option: str, known: Sequence[str]) -> list[str]:
    chosen = session.config.getoption(option) or "both"
    return [version for version in known if chosen in (version, "both")]


def _is_used(session: pytest.Session, fixture: str) -> bool:
    functions = [item for item in session.items if isinstance(item, pytest.Function)]
    return any(fixture in function.fixturenames for function in functions)


def _versions(session: pytest.Session, known: Sequence[str], *fixtures: str) -> list[str]:
    functions = [item for item in session.items if isinstance(item, pytest.Function)]
    params = [function.callspec.params for function in functions if hasattr(function, "callspec")]
    wanted = {values[fixture] for values in params for fixture in fixtures if fixture in values}
    return [version for version in known if version in wanted]


def _say_to(session: pytest.Session) -> fetch.Say:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    return reporter.write_line if reporter else lambda line: None


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not reporter.stats:
        return
    reasons = Counter(report.longrepr[2] for report in reporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        reporter.write_line(f"skipped {count}: {reason.removeprefix('Skipped: ')}")
    if not reasons:
        reporter.write_line("skipped nothing")
    if config.option.quick:
        reporter.write_line(
            f"quick: left out what needs RabbitMQ, {', '.join(NOT_QUICK)} and what takes seconds; "
            "bin/test runs everything"
        )
