"""
Checks of PostgreSQL: each problem is named with its remedy.
"""

from __future__ import annotations

import ssl
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from asyncflow.errors import ServerUnfit, StoreUnavailable
from asyncflow.findings import Finding, Verdict, refuse_unfit
from asyncflow.store.database import Database
from asyncflow.store.inspection import Expected, Facts, inspect, judged, unreachable
from asyncflow.store.schema import SCHEMA_VERSION, Schema
from tests.support.postgres import PostgresServer

GOOD = Facts(
    database="tasks",
    role="app",
    version="18.1",
    version_number=180_001,
    encoding="UTF8",
    fsync="on",
    synchronous_commit="on",
    read_only="off",
    isolation="read committed",
    search_path='"$user", public',
    sequential_scans="off",
    connections_max=97,
    connections=10,
    role_connections_max=-1,
    role_connections=5,
    statement_timeout_ms=0,
    idle_session_timeout_ms=0,
    is_standby=False,
    has_namespace=True,
    may_use_namespace=True,
    missing_rights=(),
    has_pooler=False,
    shares_sessions=False,
    clock_ahead_seconds=0.0,
    schema=Schema(SCHEMA_VERSION, SCHEMA_VERSION),
)
OURS = Expected(pooler=False, timeout_seconds=10.0, connections=10)


def bad(facts: Facts, expected: Expected = OURS) -> Finding:
    """
    The only finding that reports a problem.
    """
    (finding,) = [f for f in judged(facts, expected) if f.verdict is not Verdict.OK]
    return finding


def test_a_good_server_has_only_good_findings() -> None:
    """
    A good server has no warnings, which would otherwise appear at every start.
    """
    assert {Verdict.OK} == {finding.verdict for finding in judged(GOOD, OURS)}


@pytest.mark.parametrize(
    ("change", "what", "verdict", "may_pass", "fact", "mend"),
    [
        ({"version_number": 140_010, "version": "14.10"}, "version", "wrong", False, "14.10", "15"),
        ({"encoding": "LATIN1"}, "encoding", "wrong", False, "LATIN1", "ENCODING 'UTF8'"),
        ({"encoding": "SQL_ASCII"}, "encoding", "wrong", False, "SQL_ASCII", "ENCODING 'UTF8'"),
        ({"is_standby": True}, "writes", "wrong", True, "standby", "target_session_attrs"),
        ({"read_only": "on"}, "writes", "wrong", True, "default_transaction_read_only", "off"),
        ({"schema": None}, "schema", "wrong", False, "no AsyncFlow schema", "asyncflow migrate"),
        (
            {"schema": Schema("9999", "9999")},
            "schema",
            "wrong",
            False,
            "schema 9999",
            "Deploy a newer version",
        ),
        (
            {"schema": Schema("0000", "0000")},
            "schema",
            "wrong",
            False,
            f"needs {SCHEMA_VERSION}",
            "asyncflow migrate",
        ),
        (
            {"missing_rights": ("INSERT on tasks",)},
            "rights",
            "wrong",
            True,
            "Role app lacks INSERT on tasks.",
            "asyncflow grants app",
        ),
        (
            {"missing_rights": tuple("abcde")},
            "rights",
            "wrong",
            True,
            "lacks a, b, c and 2 more rights.",
            "asyncflow grants app",
        ),
        (
            {"has_pooler": True, "shares_sessions": True},
            "pooler",
            "wrong",
            False,
            "shares PostgreSQL sessions",
            "ASYNCFLOW_DATABASE_POOLER=true",
        ),
        (
            {"has_pooler": True, "sequential_scans": "on"},
            "pooler",
            "doubtful",
            False,
            "do not reach PostgreSQL",
            "ALTER ROLE",
        ),
        (
            {"isolation": "repeatable read"},
            "isolation",
            "wrong",
            False,
            "repeatable read",
            "read committed",
        ),
        ({"fsync": "off"}, "durability", "doubtful", False, "fsync is off", "on"),
        (
            {"fsync": "off", "synchronous_commit": "off"},
            "durability",
            "doubtful",
            False,
            "fsync and synchronous_commit are off",
            "on",
        ),
        (
            {"statement_timeout_ms": 9_999},
            "timeouts",
            "doubtful",
            False,
            "9999 ms",
            "statement_timeout = 0",
        ),
        (
            {"idle_session_timeout_ms": 1_000},
            "timeouts",
            "doubtful",
            False,
            "1000 ms",
            "idle_session_timeout = 0",
        ),
        ({"connections": 90}, "connections", "doubtful", False, "7 connections", "max_connections"),
        (
            {"role_connections_max": 6},
            "connections",
            "doubtful",
            False,
            "1 connections",
            "limit of role app",
        ),
        (
            {"search_path": "evil, pg_catalog"},
            "search_path",
            "doubtful",
            False,
            "before pg_catalog",
            "ALTER ROLE app",
        ),
        ({"clock_ahead_seconds": 61.0}, "clock", "doubtful", False, "61 seconds ahead of", "Sync"),
        ({"clock_ahead_seconds": -7.0}, "clock", "doubtful", False, "7 seconds behind", "Sync"),
    ],
)
def test_each_problem_is_named_with_its_remedy(
    change: dict[str, Any], what: str, verdict: str, may_pass: bool, fact: str, mend: str
) -> None:
    """
    Each problem has one finding, one fact and one remedy.
    """
    finding = bad(replace(GOOD, **change))

    assert (f"PostgreSQL {what}", verdict, may_pass) == (
        finding.what,
        finding.verdict.value,
        finding.may_pass,
    )
    assert fact in finding.sentence
    assert mend in finding.remedy


def test_a_schema_that_may_not_be_used_is_a_matter_of_rights() -> None:
    """
    The remedy for a schema without privileges is a grant, not a migration.
    """
    facts = replace(GOOD, may_use_namespace=False, schema=None)

    wrong = [finding for finding in judged(facts, OURS) if finding.is_wrong]

    assert ["Role app lacks USAGE on schema asyncflow."] == [f.sentence for f in wrong]


def test_a_declared_pooler_that_is_not_there_is_a_warning() -> None:
    """
    Declaring a pooler that is not there is a warning: the setting costs wake-ups and session locks.
    """
    finding = bad(GOOD, replace(OURS, pooler=True))

    assert finding.is_doubtful
    assert "straight to PostgreSQL" in finding.sentence


def test_only_what_does_not_pass_by_itself_is_refused() -> None:
    """
    A standby may be promoted, so it is waited for; a wrong encoding never changes, so it is
    refused.
    """
    refuse_unfit(judged(replace(GOOD, is_standby=True), OURS))

    with pytest.raises(ServerUnfit, match="LATIN1"):
        refuse_unfit(judged(replace(GOOD, encoding="LATIN1"), OURS))


async def inspected(db: Database) -> dict[str, Finding]:
    """
    The findings about a real server, by their subject.
    """
    findings = await inspect(db, timeout_seconds=10, connections=1)
    return {finding.what.removeprefix("PostgreSQL "): finding for finding in findings}


async def test_the_server_of_the_tests_is_fit(db: Database) -> None:
    """
    The facts are read correctly on every supported version, and the test server passes.
    """
    findings = await inspected(db)

    assert [] == [finding for finding in findings.values() if finding.verdict is not Verdict.OK]
    assert len(findings) > 10


async def test_what_is_set_for_the_database_is_seen(fresh_db: Database, database_url: str) -> None:
    """
    The facts are those of our own sessions, wherever a setting is made.
    """
    name = await fresh_db.fetchval("SELECT current_database()")
    for setting in (
        "default_transaction_isolation = 'serializable'",
        "default_transaction_read_only = on",
        "synchronous_commit = off",
        "statement_timeout = '1s'",
        "search_path = public, pg_catalog",
    ):
        await fresh_db.execute(f"ALTER DATABASE {name} SET {setting}")

    async with Database(database_url) as db:
        findings = await inspected(db)

    assert {"isolation", "writes", "durability", "timeouts", "search_path"} == {
        what for what, finding in findings.items() if finding.verdict is not Verdict.OK
    }


async def test_a_database_that_does_not_exist_is_named(postgres_server: PostgresServer) -> None:
    """
    The remedy for a missing database is the statement that creates it; a starting process waits for
    it.
    """
    url = postgres_server.cluster.url.replace("/postgres?", "/absent?")
    async with Database(url) as db:
        (finding,) = await inspect(db, timeout_seconds=10, connections=1)

    assert (True, True) == (finding.is_wrong, finding.may_pass)
    assert "The server has no database absent." == finding.sentence
    assert "CREATE DATABASE absent ENCODING 'UTF8'" in finding.remedy


async def test_a_server_that_is_away_is_waited_for() -> None:
    """
    A server that does not answer is waited for, since it may be starting.
    """
    async with Database("postgresql://nobody@127.0.0.1:1/nothing") as db:
        (finding,) = await inspect(db, timeout_seconds=10, connections=1)

    assert (True, True) == (finding.is_wrong, finding.may_pass)
    assert "PostgreSQL cannot serve now" in finding.sentence


def test_settings_of_libpq_that_cannot_be_used_are_no_outage() -> None:
    """
    Unusable libpq settings are refused, since waiting would not help.
    """
    error = StoreUnavailable("PostgreSQL cannot serve now: …")
    error.__cause__ = asyncpg.ClientConfigurationError("`sslmode` parameter must be one of: …")

    finding = unreachable(error)

    assert (True, False) == (finding.is_wrong, finding.may_pass)
    assert "PGSSLMODE" in finding.remedy


@pytest.mark.parametrize(
    "cause",
    [ssl.SSLCertVerificationError("certificate verify failed"), OSError("rejected SSL upgrade")],
)
def test_a_connection_without_tls_is_told_apart(cause: OSError) -> None:
    """
    A TLS failure is distinguished from a server that is down: the remedy is in the URL or the
    certificate.
    """
    error = StoreUnavailable("PostgreSQL cannot serve now: …")
    error.__cause__ = cause

    assert "sslrootcert" in unreachable(error).remedy
