"""
Every setting, read once from the environment and `.env`, checked, and passed down.

Nothing else in AsyncFlow looks into the environment; some of it hands it on to child
processes. `.env.example` lists the same names with their meaning; a test keeps the two in step.

Read by hand, because the libraries that do it are a quarter of an idle worker's memory.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints
from urllib.parse import urlsplit, urlunsplit

from asyncflow.domain.policy import NAME_PATTERN
from asyncflow.errors import InvalidSettings

PREFIX = "ASYNCFLOW_"

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "console", "json"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """
    The settings of one process. See `.env.example` for what each is for.

    Durations are in seconds and sizes in bytes, as the names say. What stands beside a type
    reads the setting from text, or from what the command line gave, and checks it.
    """

    database_url: Annotated[str | None, Url("postgresql", "postgres")] = None
    database_pool_size: Annotated[int, Range(2, 200, int)] = 8
    database_timeout_seconds: Annotated[float, Range(0.1, 300)] = 10.0
    database_pooler: Annotated[bool, yes_or_no] = False
    broker_url: Annotated[str | None, Url("amqp", "amqps")] = None

    api_host: Annotated[str, str] = "127.0.0.1"
    api_port: Annotated[int, Range(1, 65_535, int)] = 3000
    api_body_bytes_max: Annotated[int, Range(1_024, 256 * 1024 * 1024, int)] = 8 * 1024 * 1024
    payload_bytes_max: Annotated[int, Range(256, 64 * 1024 * 1024, int)] = 1024 * 1024
    result_bytes_max: Annotated[int, Range(256, 64 * 1024 * 1024, int)] = 1024 * 1024

    worker_handlers: Annotated[tuple[str, ...], names] = ()
    worker_queues: Annotated[tuple[str, ...], queues] = ()
    worker_concurrency: Annotated[int, Range(1, 10_000, int)] = 10
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


def load_settings(**overrides: Any) -> Settings:
    """
    Read the environment and `.env`; `overrides` (from the command line) win.

    Raises:
        InvalidSettings: With one sentence per mistake, naming each variable.
    """
    given = _variables() | {name: value for name, value in overrides.items() if value is not None}
    hints = get_type_hints(Settings, include_extras=True)
    values: dict[str, Any] = {}
    mistakes = []
    for name in (field.name for field in fields(Settings) if field.name in given):
        read: Callable[[Any], Any] = hints[name].__metadata__[0]
        try:
            values[name] = read(given[name])
        except ValueError as error:
            # The value is not echoed: a URL may hold a password.
            mistakes.append(f"{PREFIX}{name.upper()}: {error}.")
    settings = Settings(**values)
    mistakes = mistakes or _contradictions(settings)
    if mistakes:
        raise InvalidSettings(mistakes)
    return settings


def _variables() -> dict[str, str]:
    """
    What the environment and `.env` say, by the settings' names; empty text says nothing.
    """
    given: dict[str, str] = {}
    for source in (_env_file(Path(".env")), os.environ):
        for variable, value in source.items():
            if value and variable.upper().startswith(PREFIX):
                given[variable.upper().removeprefix(PREFIX).lower()] = value
    return given


def _env_file(path: Path) -> Mapping[str, str | None]:
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    return dotenv_values(path, encoding="utf-8")


def _contradictions(settings: Settings) -> list[str]:
    mistakes = []
    if settings.lease_seconds < 3 * settings.heartbeat_seconds:
        mistakes.append(
            f"{PREFIX}LEASE_SECONDS={settings.lease_seconds:g} must be at least three times "
            f"{PREFIX}HEARTBEAT_SECONDS={settings.heartbeat_seconds:g}, "
            "or a worker loses its leases to one slow heartbeat."
        )
    if settings.payload_bytes_max > settings.api_body_bytes_max:
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
            raise ValueError(f"it must be {words} from {self.low} to {self.high}")
        return number


class OneOf:
    """
    Reads one of a few words.
    """

    def __init__(self, *words: str) -> None:
        self._words = words

    def __call__(self, given: str) -> str:
        if given.lower() not in self._words:
            raise ValueError(f"it must be {', '.join(self._words[:-1])} or {self._words[-1]}")
        return given.lower()


class Url:
    """
    Leaves a URL as it is, if it has one of these schemes.
    """

    def __init__(self, *schemes: str) -> None:
        self._schemes = schemes

    def __call__(self, given: str) -> str:
        try:
            scheme = urlsplit(given).scheme
        except ValueError:
            raise ValueError("it is not a URL") from None
        if scheme not in self._schemes:
            starts = " or ".join(f"{scheme}://" for scheme in self._schemes)
            raise ValueError(f"it must begin with {starts}")
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
    raise ValueError("it must be true or false")


def names(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """
    Read a comma-separated list.
    """
    parts = given.split(",") if isinstance(given, str) else given
    return tuple(part.strip() for part in parts if part.strip())


def queues(given: str | tuple[str, ...]) -> tuple[str, ...]:
    """
    Read a comma-separated list of names of queues; one that is named twice counts once.
    """
    listed = tuple(dict.fromkeys(names(given)))
    for name in listed:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(f"{name!r} is no queue; use 1 to 128 of A-Z a-z 0-9 . _ -")
    return listed


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
                    f"{PREFIX}DATABASE_URL is not set; give a PostgreSQL 15+ database such as "
                    "postgresql://user:password@host:5432/asyncflow "
                    "(`asyncflow dev` needs none: it brings its own)."
                )
            ]
        )
    return settings.database_url


def masked(url: str) -> str:
    """
    `url` fit for a log or a screen: its password, if any, reads `***`.

    Where an unescaped character makes it unclear what the password is, nothing is shown.
    """
    url = re.sub(r"([?&](?:ssl)?password=)[^&]*", r"\1***", url)
    parts = urlsplit(url)
    if "@" in url.replace(parts.netloc, "", 1):
        return f"{parts.scheme}://***"
    if parts.password is None:
        return url
    user_info, _, host = parts.netloc.rpartition("@")
    user = user_info.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:***@{host}"))
