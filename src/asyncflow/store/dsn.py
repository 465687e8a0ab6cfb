"""
The database URL as asyncpg needs it.

People bring URLs from their provider or another program, with parameters of libpq, JDBC or
Prisma. asyncpg takes some of them, and would send the rest to the server, which refuses the
connection. `PARAMETERS` says of each what becomes of it here: taken, needless, or refused with what
to write instead. A name that is not in it is refused, and not repeated: it may be a piece of a
password.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from asyncflow.errors import InvalidSettings
from asyncflow.urls import Parts, UnclearUrl, split_url

VARIABLE = "ASYNCFLOW_DATABASE_URL"
UNCLEAR = (
    f"{VARIABLE} must look like postgresql://user:password@host:5432/database, with special "
    "characters in user and password percent-encoded, such as %40 for @ and %2F for /."
)
SCHEMES = ("postgresql", "postgres")


@dataclass(frozen=True, slots=True)
class Taken:
    """
    asyncpg does what libpq does with it.

    Attributes:
        values: The only ones it may have; empty means any.
        otherwise: What to say about other values.
    """

    values: tuple[str, ...] = ()
    otherwise: str = ""


@dataclass(frozen=True, slots=True)
class Needless:
    """
    Left out, because AsyncFlow sees to it by itself or does not do what it would forbid.

    Attributes:
        why: For the documentation.
        values: The only ones it may have; empty means any.
        otherwise: What to say about other values.
    """

    why: str
    values: tuple[str, ...] = ()
    otherwise: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """
    AsyncFlow cannot do it, and leaving it out would change what the URL means.

    Attributes:
        instead: What to do, as the end of a sentence.
    """

    instead: str


_KEEPALIVE = Needless("connections have keepalives of their own")
_TLS_VERSIONS = ("TLSv1.2", "TLSv1.3")
_POOL = Refused("remove it and set ASYNCFLOW_DATABASE_POOL_SIZE")
_TIMEOUT = Refused("remove it and set ASYNCFLOW_DATABASE_TIMEOUT_SECONDS")
_SCHEMA = Refused("remove it, AsyncFlow's schema is always named asyncflow")
_NO_METHOD = Refused("remove it, AsyncFlow logs in with a password or a certificate")
_CACHE = Refused("remove it, ASYNCFLOW_DATABASE_POOLER decides about prepared statements")

PARAMETERS: Mapping[str, Taken | Needless | Refused] = {
    # Where, and as whom
    "host": Taken(),
    "port": Taken(),
    "dbname": Taken(),
    "database": Taken(),
    "user": Taken(),
    "password": Taken(),
    "passfile": Taken(),
    "service": Taken(),
    "servicefile": Refused("remove it and set PGSERVICEFILE"),
    "hostaddr": Refused("write the address in place of the host"),
    "target_session_attrs": Taken(
        ("any", "primary", "read-write"), "must lead to a server that takes writes: read-write"
    ),
    "load_balance_hosts": Needless("only one of the hosts is the primary"),
    "options": Taken(),
    "application_name": Needless("AsyncFlow's sessions have names of their own"),
    "fallback_application_name": Needless("AsyncFlow's sessions have names of their own"),
    "client_encoding": Needless(
        "sessions are always UTF8", ("utf8", "UTF8", "utf-8", "UTF-8", "auto"), "must be UTF8"
    ),
    "search_path": Needless("statements name their schema"),
    # Time
    "connect_timeout": Needless("ASYNCFLOW_DATABASE_TIMEOUT_SECONDS bounds it"),
    "keepalives": _KEEPALIVE,
    "keepalives_idle": _KEEPALIVE,
    "keepalives_interval": _KEEPALIVE,
    "keepalives_count": _KEEPALIVE,
    "tcp_user_timeout": _KEEPALIVE,
    # Encryption and logging in
    "sslmode": Taken(("disable", "allow", "prefer", "require", "verify-ca", "verify-full")),
    "sslrootcert": Taken(),
    "sslcert": Taken(),
    "sslkey": Taken(),
    "sslpassword": Taken(),
    "sslcrl": Taken(),
    "sslcrldir": Refused("write sslcrl with one file"),
    "sslnegotiation": Taken(("postgres", "direct")),
    "ssl_min_protocol_version": Taken(_TLS_VERSIONS),
    "ssl_max_protocol_version": Taken(_TLS_VERSIONS),
    "sslcompression": Needless("nothing is compressed", ("0",), "must be 0"),
    "sslsni": Needless("the host's name is always sent", ("1",), "must be 1"),
    "sslcertmode": Needless("a certificate is sent if there is one", ("allow",), "must be allow"),
    "sslkeylogfile": Refused("remove it, the environment variable is SSLKEYLOGFILE"),
    "channel_binding": Needless(
        "there is none",
        ("prefer", "disable"),
        "cannot be required; write prefer, with sslmode=verify-full for the same protection",
    ),
    "gssencmode": Needless(
        "there is none", ("prefer", "disable"), "cannot be required; write sslmode=verify-full"
    ),
    "gssdelegation": Needless("nothing is delegated", ("0",), "must be 0"),
    "krbsrvname": Taken(),
    "gsslib": Taken(("gssapi", "sspi")),
    "min_protocol_version": Needless(
        "the protocol is 3.0", ("3.0",), "must be 3.0, the version that AsyncFlow speaks"
    ),
    "max_protocol_version": Needless("the protocol is 3.0"),
    "require_auth": Refused("remove it, AsyncFlow takes the server's choice"),
    "requirepeer": Refused("remove it, AsyncFlow does not ask who owns a socket"),
    "requiressl": Refused("write sslmode=require"),
    "scram_client_key": _NO_METHOD,
    "scram_server_key": _NO_METHOD,
    "oauth_issuer": _NO_METHOD,
    "oauth_client_id": _NO_METHOD,
    "oauth_client_secret": _NO_METHOD,
    "oauth_scope": _NO_METHOD,
    "replication": Refused("remove it, AsyncFlow does not replicate"),
    # Of other programs
    "ssl": Refused("write sslmode=require, or sslmode=verify-full to check certificates"),
    "pgbouncer": Refused("remove it and set ASYNCFLOW_DATABASE_POOLER=true"),
    "schema": _SCHEMA,
    "currentSchema": _SCHEMA,
    "connection_limit": _POOL,
    "pool_size": _POOL,
    "pool_timeout": _TIMEOUT,
    "socket_timeout": _TIMEOUT,
    "socketTimeout": _TIMEOUT,
    "connectTimeout": _TIMEOUT,
    "command_timeout": _TIMEOUT,
    "statement_timeout": _TIMEOUT,
    "lock_timeout": _TIMEOUT,
    "statement_cache_size": _CACHE,
    "prepared_statement_cache_size": _CACHE,
    "prepareThreshold": _CACHE,
}
"""Every parameter of libpq (PostgreSQL 18, "Parameter Key Words"), and what else people write."""

ROOT_OF_SYSTEM = "system"
FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")


def connection_arguments(url: str) -> dict[str, Any]:
    """
    What to give to `asyncpg.connect` or `asyncpg.create_pool` for this URL.

    Raises:
        InvalidSettings: With one sentence per mistake; a value is never repeated.
    """
    parts = _parts(url)
    given = {name: value for name, value in parts.parameters.items() if value}
    mistakes = [*_mistakes(given)] or [*_mistakes_of_tls(given)]
    if mistakes:
        raise InvalidSettings([f"{VARIABLE}: {mistake}." for mistake in mistakes])
    taken = {name: value for name, value in given.items() if _is_taken(name)}
    arguments: dict[str, Any] = {}
    if taken.get("sslrootcert") == ROOT_OF_SYSTEM:
        arguments["ssl"] = _context_of_system(taken)
        taken = {n: v for n, v in taken.items() if n not in ("sslmode", "sslpassword", *FILES)}
    # Without a path asyncpg chooses the database as psql does; with an empty one it does not.
    path = f"/{quote(parts.path, safe='')}" if parts.path else ""
    query = f"?{urlencode(taken, quote_via=quote)}" if taken else ""
    arguments["dsn"] = f"{parts.scheme}://{parts.authority}{path}{query}"
    return arguments


def _parts(url: str) -> Parts:
    try:
        parts = split_url(url)
    except UnclearUrl:
        raise InvalidSettings([UNCLEAR]) from None
    if parts.scheme not in SCHEMES:
        raise InvalidSettings([UNCLEAR])
    return parts


def _is_taken(name: str) -> bool:
    return isinstance(PARAMETERS[name], Taken)


def _mistakes(given: Mapping[str, str]) -> Iterator[str]:
    for number, (name, value) in enumerate(given.items(), 1):
        match PARAMETERS.get(name):
            case None:
                yield _unknown(number, name)
            case Refused(instead):
                yield f"parameter {name} cannot be used; {instead}"
            case Taken(values, otherwise) | Needless(_, values, otherwise):
                if values and value not in values:
                    yield f"parameter {name} {otherwise or 'must be ' + _listed(values)}"
    if not all(port.isdecimal() for port in given.get("port", "0").split(",")):
        yield "parameter port must be a number"


def _unknown(number: int, name: str) -> str:
    from difflib import get_close_matches  # rarely needed, and not small

    meant = get_close_matches(name, PARAMETERS, n=1, cutoff=0.8)
    remedy = f"perhaps {meant[0]} is meant" if meant else "remove it"
    return f"parameter number {number} is not known; {remedy}"


def _listed(values: tuple[str, ...]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


def _mistakes_of_tls(given: Mapping[str, str]) -> Iterator[str]:
    mode = given.get("sslmode", "")
    if mode == "disable":
        return
    root = given.get("sslrootcert")
    if root == ROOT_OF_SYSTEM and mode not in ("", "verify-full"):
        yield "sslrootcert=system needs sslmode=verify-full"
    if mode.startswith("verify") and root is None and not _has_own_root():
        yield (
            f"sslmode={mode} needs sslrootcert, the file with the certificate of the server's "
            "authority, or sslrootcert=system for those that this machine trusts"
        )
    if given.get("sslnegotiation") == "direct" and mode not in (
        "require",
        "verify-ca",
        "verify-full",
    ):
        yield "sslnegotiation=direct needs sslmode=require, verify-ca or verify-full"
    unreadable = [*_unreadable_files(given)]
    yield from unreadable or _useless_files(given)


def _has_own_root() -> bool:
    # Where asyncpg looks without being told, as libpq does.
    if os.environ.get("PGSSLROOTCERT"):
        return True
    try:
        return (Path.home() / ".postgresql" / "root.crt").exists()
    except RuntimeError:
        return False


def _unreadable_files(given: Mapping[str, str]) -> Iterator[str]:
    for name in FILES:
        if name not in given or given[name] == ROOT_OF_SYSTEM:
            continue
        try:
            with Path(given[name]).open("rb"):
                pass
        except OSError as error:
            yield f"the file of {name} cannot be read: {error.strerror or type(error).__name__}"


def _useless_files(given: Mapping[str, str]) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for name in ("sslrootcert", "sslcrl"):
        if name in given and given[name] != ROOT_OF_SYSTEM:
            try:
                context.load_verify_locations(cafile=given[name])
            except ssl.SSLError:
                yield f"the file of {name} holds nothing of the kind in PEM format"
    if "sslcert" in given:
        try:
            _load_certificate(context, given)
        except ssl.SSLError:
            yield (
                "sslcert and sslkey must be a certificate and its key in PEM format, with "
                "sslpassword if the key is encrypted"
            )


def _context_of_system(given: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["postgresql"])
    if "sslcert" in given:
        _load_certificate(context, given)
    if "sslcrl" in given:
        context.load_verify_locations(cafile=given["sslcrl"])
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
    return context


def _load_certificate(context: ssl.SSLContext, given: Mapping[str, str]) -> None:
    # Without a password of ours it would be asked for on the terminal.
    context.load_cert_chain(
        given["sslcert"], given.get("sslkey"), password=given.get("sslpassword", "")
    )
