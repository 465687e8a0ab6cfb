"""
Parameters of a database URL are accepted, ignored or refused by name, and never sent to a server
that does not know them.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from asyncflow.errors import InvalidSettings
from asyncflow.store.database import Database
from asyncflow.store.dsn import PARAMETERS, Needless, Refused, Taken, connection_arguments

pytestmark = pytest.mark.any_postgres

ROOT = Path(__file__).parents[2]


def mistakes(query: str) -> list[str]:
    """
    What the check says about a URL with these parameters.
    """
    with pytest.raises(InvalidSettings) as refusal:
        connection_arguments(f"postgresql://me:s3cret@host/db?{query}")
    assert "s3cret" not in str(refusal.value)
    return list(refusal.value.mistakes)


def query_of(query: str) -> dict[str, str]:
    """
    Which parameters reach asyncpg.
    """
    dsn = connection_arguments(f"postgresql://host/db?{query}")["dsn"]
    return {name: value for name, [value] in parse_qs(urlsplit(dsn).query).items()}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://host",
        "postgresql://host/db",
        "postgres://user:p%40ss@host:5432/db?sslmode=require",
        "postgresql://user@/db?host=/run/postgresql",
        "postgresql://a:1,b:2/db?target_session_attrs=read-write",
        "postgresql://host/db?options=-c%20geqo%3Doff",
    ],
)
def test_a_url_that_asyncpg_takes_is_left_as_it_is(url: str) -> None:
    """
    A URL that asyncpg accepts is unchanged, including sockets and multiple hosts for failover.
    """
    (dsn,) = connection_arguments(url).values()

    assert urlsplit(url)[:3] == urlsplit(dsn)[:3]
    assert parse_qs(urlsplit(url).query) == parse_qs(urlsplit(dsn).query)


@pytest.mark.parametrize(
    "url",
    ["", "mysql://host/db", "postgresql://host:port/db", "postgresql://me:a@b:s3cret/d@host/db"],
)
def test_an_invalid_url_is_refused_before_anything_starts(url: str) -> None:
    """
    An invalid URL is refused before startup, naming the setting and what to do about special
    characters.
    """
    with pytest.raises(
        InvalidSettings, match=r"ASYNCFLOW_DATABASE_URL.*percent-encoded"
    ) as refusal:
        connection_arguments(url)

    assert "s3cret" not in str(refusal.value)


async def test_providers_urls_connect(database_url: str) -> None:
    """
    URLs connect that contain parameters of Neon, libpq and others that have no meaning here.
    """
    needless = {
        name: parameter.values[0] if parameter.values else "1"
        for name, parameter in PARAMETERS.items()
        if isinstance(parameter, Needless)
    }
    query = "&".join(f"{name}={value}" for name, value in needless.items())

    async with Database(f"{database_url}&{query}") as db:
        assert 1 == await db.fetchval("SELECT 1")

    assert {} == query_of(query)
    assert len(needless) > 10


async def test_options_reach_the_server(database_url: str) -> None:
    """
    `options=-c …` sets a server parameter for the session.
    """
    async with Database(f"{database_url}&options=-c%20geqo%3Doff") as db:
        assert "off" == await db.fetchval("SHOW geqo")


@pytest.mark.parametrize(
    "name", [name for name, use in PARAMETERS.items() if isinstance(use, Refused)]
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    """
    The refusal names the parameter and says in one sentence what to do instead.
    """
    (mistake,) = mistakes(f"{name}=x")

    assert mistake.startswith(f"ASYNCFLOW_DATABASE_URL: parameter {name} cannot be used; ")
    assert mistake.endswith(".")


@pytest.mark.parametrize(
    "name",
    [n for n, use in PARAMETERS.items() if isinstance(use, Taken | Needless) and use.values],
)
def test_a_value_that_cannot_be_honoured_is_refused_by_name(name: str) -> None:
    """
    The refusal names the parameter and does not repeat its value.
    """
    (mistake,) = mistakes(f"{name}=xyzzy")

    assert mistake.startswith(f"ASYNCFLOW_DATABASE_URL: parameter {name} ")
    assert "xyzzy" not in mistake


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("ssl=true", "write sslmode=require, or sslmode=verify-full"),
        ("pgbouncer=true", "set ASYNCFLOW_DATABASE_POOLER=true"),
        ("schema=x", "always named asyncflow"),
        ("sslmode=on", "must be disable, allow, prefer, require, verify-ca or verify-full"),
        ("target_session_attrs=standby", "takes writes"),
        ("channel_binding=require", "cannot be required"),
        ("sslmod=require", "parameter number 1 is not known; perhaps sslmode is meant"),
        ("sslmode=require&xyzzy=1", "parameter number 2 is not known; remove it"),
        ("sslrootcert=/nowhere/xyzzy", "the file of sslrootcert cannot be read: No such file"),
        ("sslcert=/nowhere/xyzzy", "the file of sslcert cannot be read: No such file"),
        ("sslmode=require&sslrootcert=system", "sslrootcert=system needs sslmode=verify-full"),
        ("sslnegotiation=direct", "sslnegotiation=direct needs sslmode="),
        ("port=xyzzy", "port must be a number"),
    ],
)
def test_each_mistake_says_what_would_have_worked(query: str, sentence: str) -> None:
    """
    Each mistake is reported with what would have worked, without a traceback or the value.
    """
    (mistake,) = mistakes(query)

    assert sentence in mistake
    assert "xyzzy" not in mistake


def test_all_mistakes_are_reported_together() -> None:
    """
    All mistakes are reported together, each in its own sentence.
    """
    assert 2 == len(mistakes("ssl=true&schema=x"))


def test_a_file_that_holds_no_certificate_is_named(tmp_path: Path) -> None:
    """
    A file without a certificate is named at startup, rather than failing every connection attempt.
    """
    file = tmp_path / "x.pem"
    file.write_text("nothing")

    assert "sslrootcert holds nothing" in mistakes(f"sslrootcert={file}")[0]
    assert "sslcert and sslkey must be" in mistakes(f"sslcert={file}")[0]
    assert {} == query_of("") and query_of(f"sslmode=disable&sslcert={file}")


def test_a_check_of_certificates_needs_an_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Certificate verification needs an authority, from the URL or libpq's default path.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PGSSLROOTCERT", raising=False)

    (mistake,) = mistakes("sslmode=verify-full")
    (tmp_path / ".postgresql").mkdir()
    (tmp_path / ".postgresql" / "root.crt").touch()

    assert "sslmode=verify-full needs sslrootcert" in mistake
    assert {"sslmode": "verify-full"} == query_of("sslmode=verify-full")


def test_the_authorities_of_the_system_can_be_trusted() -> None:
    """
    As in libpq since PostgreSQL 16, the certificate and the name are checked.
    """
    arguments = connection_arguments("postgresql://host/db?sslrootcert=system&connect_timeout=3")

    assert "postgresql://host/db" == arguments["dsn"]
    assert (ssl.CERT_REQUIRED, True) == (
        arguments["ssl"].verify_mode,
        arguments["ssl"].check_hostname,
    )


def test_every_parameter_of_asyncpg_is_known() -> None:
    """
    Every parameter that asyncpg reads from a DSN has a line in the table.
    """
    source = Path(asyncpg.connect_utils.__file__).read_text()
    taken = set(re.findall(r"query\.pop\(\s*'(\w+)'", source))

    assert len(taken) > 15
    assert taken <= {name for name, use in PARAMETERS.items() if isinstance(use, Taken)}


def test_the_list_of_parameters_in_the_documentation_is_true() -> None:
    """
    The documentation lists each parameter and what happens to it.
    """
    text = (ROOT / "docs" / "operations.md").read_text()
    listed = {
        row[1]: set(re.findall(r"`(\w+)`", row[2]))
        for row in re.finditer(r"^\| parameters (\w+) \|([^|]*)\|", text, re.M)
    }

    assert listed == {
        kind.__name__.lower(): {name for name, use in PARAMETERS.items() if isinstance(use, kind)}
        for kind in (Taken, Needless, Refused)
    }
