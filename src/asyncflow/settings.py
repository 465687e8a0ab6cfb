"""
Every setting, read once from the environment and `.env`, validated, and passed down.

No other module reads the environment; some pass it on to child processes. `.env.example` explains
the settings; a test keeps the two in step.

No library does this, because those that could are a quarter of an idle worker's memory.
"""

from __future__ import annotations

import math
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from asyncflow.domain.policy import NAME_PATTERN
from asyncflow.errors import InvalidSettings
from asyncflow.urls import UnclearUrl, split_url
from asyncflow.urls import masked as masked  # Settings that hold a URL are shown with it.

PREFIX = "ASYNCFLOW_"
NOT_SETTINGS = re.compile(
    r"python|cache|test_.*"  # read by bin/setup and the tests
    # Kubernetes sets these for a Service whose name begins with `asyncflow`.
    r"|(.*_)?service_(host|port.*)|(.*_)?port_\d+_(tcp|udp).*"
)
"""Variables with our prefix, here without it, that are not meant for a process of ours."""

SYNONYMS = {"worker_concurrency": "worker_slots"}
"""What other task queues call a setting of ours."""

PREFIX_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,32}")

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "console", "json"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    The settings of one process; `.env.example` explains each.

    Durations are in seconds and sizes in bytes, as the names say. The annotation of a type reads
    and validates the setting, given as text or as the value of a command line option.
    """

    database_url: Annotated[str | None, Url("postgresql", "postgres")] = None
    database_pool_size: Annotated[int, Range(2, 200, int)] = 8
    database_timeout_seconds: Annotated[float, Range(0.1, 300)] = 10.0
    database_pooler: Annotated[bool, yes_or_no] = False
    broker_url: Annotated[str | None, Url("amqp", "amqps")] = None
    broker_prefix: Annotated[str, prefix] = "asyncflow"

    api_host: Annotated[str, str] = "127.0.0.1"
    api_port: Annotated[int, Range(1, 65_535, int)] = 3000
    api_hosts: Annotated[tuple[str, ...], hosts] = ()
    api_cors_origins: Annotated[tuple[str, ...], origins] = ()
    api_root_path: Annotated[str, root_path] = ""
    api_keep_alive_seconds: Annotated[float, Range(1, 3_600)] = 75.0
    api_body_bytes_max: Annotated[int, Range(1_024, 256 * 1024 * 1024, int)] = 8 * 1024 * 1024
    payload_bytes_max: Annotated[int, Range(256, 64 * 1024 * 1024, int)] = 1024 * 1024
    result_bytes_max: Annotated[int, Range(256, 64 * 1024 * 1024, int)] = 1024 * 1024

    worker_handlers: Annotated[tuple[str, ...], names] = ()
    worker_queues: Annotated[tuple[str, ...], queues] = ()
    worker_slots: Annotated[int, Range(1, 10_000, int)] = 10
    worker_processes: Annotated[int, Range(1, 256, int)] = 1
    heartbeat_seconds: Annotated[float, Range(0.05, 60)] = 1.0
    lease_seconds: Annotated[float, Range(0.5, 3_600)] = 15.0
    shutdown_grace_seconds: Annotated[float, Range(0, 86_400)] = 30.0
    cancel_grace_seconds: Annotated[float, Range(0, 3_600)] = 10.0
    stall_seconds: Annotated[float, Range(1, 86_400)] = 60.0

    retention_days: Annotated[float, Range(0, 3_650)] = 14.0

    log_level: Annotated[Level, OneOf(*get_args(Level))] = "info"
    log_format: Annotated[Format, OneOf(*get_args(Format))] = "auto"

    data_folder: Annotated[Path, Path] = Path(".asyncflow")


def load_settings(options: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
    """
    Read the environment and `.env`; `overrides`, from the command line, take precedence.

    Args:
        options: The option of each overridden setting, for errors: `{"api_port": "--port"}`.

    Raises:
        InvalidSettings: With one sentence per mistake, naming each variable or option.
    """
    typed = {name: value for name, value in overrides.items() if value is not None}
    given = _variables() | typed
    hints = get_type_hints(Settings, include_extras=True)
    known = [field.name for field in fields(Settings)]
    values: dict[str, Any] = {}
    mistakes = _misspelt(known)
    unusable = set()
    for name in (name for name in known if name in given):
        read: Callable[[Any], Any] = hints[name].__metadata__[0]
        try:
            values[name] = read(given[name])
        except ValueError as error:
            source = (options or {}).get(name) if name in typed else None
            # The value is not quoted: a URL may contain a password.
            mistakes.append(f"{source or variable(name)}: {error}.{_origin(given[name])}")
            unusable.add(name)
    settings = Settings(**values)
    mistakes += _contradictions(settings, unusable)
    if mistakes:
        raise InvalidSettings(mistakes)
    return settings


def variable(name: str) -> str:
    """
    The environment variable of a setting.
    """
    return f"{PREFIX}{name.upper()}"


def unknown_variables() -> list[str]:
    """
    Variables with our prefix that are not settings of this version.
    """
    known = {field.name for field in fields(Settings)}
    return [
        variable(name)
        for name in _variables()
        if name not in known and not NOT_SETTINGS.fullmatch(name)
    ]


def _variables() -> dict[str, str]:
    """
    The variables of the environment and `.env`, by the settings' names.

    An empty value means the default, also if the environment is empty and `.env` is not.
    """
    given: dict[str, str] = {}
    for source in (_env_file(Path(".env")), os.environ):
        for name, value in source.items():
            if name.upper().startswith(PREFIX):
                given[name.upper().removeprefix(PREFIX).lower()] = value or ""
    return {name: value for name, value in given.items() if value}


def _misspelt(known: Sequence[str]) -> list[str]:
    # A setting that silently has no effect is noticed at night. Only near misses are refused: after
    # a rollback the environment may contain settings of the newer version.
    mistakes = []
    meanings = {variable(name): variable(name) for name in known}
    meanings |= {variable(name): variable(meant) for name, meant in SYNONYMS.items()}
    for unknown in unknown_variables():
        from difflib import get_close_matches  # rarely needed, and not small

        for close in get_close_matches(unknown, meanings, n=1, cutoff=0.9):
            mistakes.append(f"{unknown} is not a setting; did you mean {meanings[close]}?")
    return mistakes


def _origin(given: Any) -> str:
    # `API_PORT=tcp://10.0.0.7:3000` is set in pods by a Service named asyncflow-api.
    if not str(given).startswith(("tcp://", "udp://")):
        return ""
    return (
        " Kubernetes sets such variables for a Service with a similar name; "
        "`enableServiceLinks: false` in the pod's spec prevents that."
    )


def _env_file(path: Path) -> Mapping[str, str | None]:
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    return dotenv_values(path, encoding="utf-8")


def _contradictions(settings: Settings, unusable: Set[str]) -> list[str]:
    mistakes = []
    if not unusable & {"lease_seconds", "heartbeat_seconds"} and (
        settings.lease_seconds < 3 * settings.heartbeat_seconds
    ):
        mistakes.append(
            f"{PREFIX}LEASE_SECONDS={settings.lease_seconds:g} must be at least three times "
            f"{PREFIX}HEARTBEAT_SECONDS={settings.heartbeat_seconds:g}, "
            "or one slow heartbeat costs a worker its leases."
        )
    if not unusable & {"payload_bytes_max", "api_body_bytes_max"} and (
        settings.payload_bytes_max > settings.api_body_bytes_max
    ):
        mistakes.append(
            f"{PREFIX}PAYLOAD_BYTES_MAX={settings.payload_bytes_max} cannot exceed "
            f"{PREFIX}API_BODY_BYTES_MAX={settings.api_body_bytes_max}."
        )
    return mistakes


@dataclass(frozen=True)
class Range:
    """
    Reads a number from `low` to `high`.
    """

    low: float
    high: float
    kind: type[int] | type[float] = float

    def __call__(self, given: Any) -> float:
        try:
            number = self.kind(given)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high:
            words = "a whole number" if self.kind is int else "a number"
            raise ValueError(f"must be {words} from {self.low} to {self.high}")
        return number


class OneOf:
    """
    Reads one of a few words.
    """

    def __init__(self, *words: str) -> None:
        self._words = words

    def __call__(self, given: str) -> str:
        if given.lower() not in self._words:
            raise ValueError(f"must be {', '.join(self._words[:-1])} or {self._words[-1]}")
        return given.lower()


class Url:
    """
    Returns a URL unchanged if it has one of these schemes and is unambiguous.
    """

    def __init__(self, *schemes: str) -> None:
        self._schemes = schemes

    def __call__(self, given: str) -> str:
        if given.partition("://")[0] not in self._schemes:
            starts = " or ".join(f"{scheme}://" for scheme in self._schemes)
            raise ValueError(f"must begin with {starts}")
        try:
            split_url(given)
        except UnclearUrl:
            raise ValueError(
                f"must look like {self._schemes[0]}://user:password@host:port/name, with "
                "special characters in user, password and name percent-encoded, such as %40 for "
                "@ and %2F for /"
            ) from None
        return given


def yes_or_no(given: str | bool) -> bool:
    """
    Read true or false, in any of the usual words.
    """
    word = str(given).lower()
    if word in ("true", "yes", "on", "1", "t", "y"):
        return True
    if word in ("false", "no", "off", "0", "f", "n"):
        return False
    raise ValueError("must be true or false")


def names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """
    Read a comma-separated list.
    """
    parts = given.split(",") if isinstance(given, str) else given
    return tuple(part.strip() for part in parts if part.strip())


def queues(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """
    Read a comma-separated list of queue names; duplicates count once.
    """
    listed = tuple(dict.fromkeys(names(given)))
    for name in listed:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                f"invalid queue name {name!r}: 1 to 128 characters from A-Z a-z 0-9 . _ -"
            )
    return listed


def hosts(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """
    Read a comma-separated list of host names and IP addresses; `*` is any.
    """
    listed = names(given)
    if not all(host == "*" or _HOST.fullmatch(host) or _is_ipv6(host) for host in listed):
        raise ValueError(
            "must be names or IP addresses without scheme and port, such as "
            "tasks.example.com, or * for any"
        )
    return listed


def origins(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """
    Read a comma-separated list of origins of web pages; `*` is any.
    """
    listed = names(given)
    if not all(origin == "*" or _ORIGIN.fullmatch(origin) for origin in listed):
        raise ValueError(
            "must be origins, scheme and host without a path, such as "
            "https://app.example.com, or * for any"
        )
    return listed


def root_path(given: str) -> str:
    """
    Read the path under which a proxy serves the API; a trailing slash is ignored.
    """
    path = given.rstrip("/")
    if path and not _ROOT_PATH.fullmatch(path):
        raise ValueError(
            "must be a path such as /asyncflow, with characters from A-Z a-z 0-9 . _ ~ -"
        )
    return path


_ROOT_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_ORIGIN = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)


def _is_ipv6(host: str) -> bool:
    try:
        socket.inet_pton(socket.AF_INET6, host.removeprefix("[").removesuffix("]"))
    except OSError:
        return False
    return True


def prefix(given: str) -> str:
    """
    Read the prefix of our names in RabbitMQ.
    """
    if not PREFIX_PATTERN.fullmatch(given):
        raise ValueError("must be 1 to 32 characters from A-Z a-z 0-9 _ -")
    return given


def required_database_url(settings: Settings) -> str:
    """
    The database's DSN.

    Raises:
        InvalidSettings: It is not set.
    """
    if settings.database_url is None:
        raise InvalidSettings(
            [
                (
                    f"{PREFIX}DATABASE_URL is not set; use a PostgreSQL 15+ database such as "
                    "postgresql://user:password@host:5432/asyncflow "
                    "(`asyncflow dev` needs none: it has an embedded one)."
                )
            ]
        )
    return settings.database_url
