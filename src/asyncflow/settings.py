"""
Every setting, read once from the environment and `.env`, checked, and passed down.

Nothing else in AsyncFlow looks into the environment; some of it hands it on to child
processes. `.env.example` lists the same names with
their meaning; a test keeps the two in step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from asyncflow.domain.policy import NAME_PATTERN
from asyncflow.errors import InvalidSettings

PREFIX = "ASYNCFLOW_"

Names = Annotated[tuple[str, ...], NoDecode]
"""A comma-separated list of names."""


class Settings(BaseSettings):
    """
    The settings of one process. See `.env.example` for what each is for.

    Durations are in seconds and sizes in bytes, as the names say.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_file=".env", env_ignore_empty=True, extra="ignore", frozen=True
    )

    database_url: str | None = None
    database_pool_size: int = Field(default=8, ge=2, le=200)
    database_timeout_seconds: float = Field(default=10.0, ge=0.1, le=300)
    database_pooler: bool = False
    broker_url: str | None = None

    api_host: str = "127.0.0.1"
    api_port: int = Field(default=3000, ge=1, le=65_535)
    api_body_bytes_max: int = Field(default=8 * 1024 * 1024, ge=1_024, le=256 * 1024 * 1024)
    payload_bytes_max: int = Field(default=1024 * 1024, ge=256, le=64 * 1024 * 1024)
    result_bytes_max: int = Field(default=1024 * 1024, ge=256, le=64 * 1024 * 1024)

    worker_handlers: Names = ()
    worker_queues: Names = ()
    worker_concurrency: int = Field(default=10, ge=1, le=10_000)
    worker_processes: int = Field(default=1, ge=1, le=256)
    heartbeat_seconds: float = Field(default=1.0, ge=0.05, le=60)
    lease_seconds: float = Field(default=15.0, ge=0.5, le=3_600)
    shutdown_grace_seconds: float = Field(default=30.0, ge=0, le=86_400)
    cancel_grace_seconds: float = Field(default=10.0, ge=0, le=3_600)
    stall_seconds: float = Field(default=60.0, ge=1, le=86_400)

    retention_days: float = Field(default=14.0, ge=0, le=3_650)

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"

    data_folder: Path = Path(".asyncflow")

    @field_validator("worker_handlers", "worker_queues", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("worker_queues")
    @classmethod
    def _are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not NAME_PATTERN.fullmatch(name):
                raise ValueError(f"{name!r} is no queue; use 1 to 128 of A-Z a-z 0-9 . _ -")
        return value

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("postgresql", "postgres"):
            raise ValueError("it must begin with postgresql://")
        return value

    @field_validator("broker_url")
    @classmethod
    def _is_amqp(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).scheme not in ("amqp", "amqps"):
            raise ValueError("it must begin with amqp:// or amqps://")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.lease_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"{PREFIX}LEASE_SECONDS={self.lease_seconds:g} must be at least three times "
                f"{PREFIX}HEARTBEAT_SECONDS={self.heartbeat_seconds:g}, "
                "or a worker loses its leases to one slow heartbeat."
            )
        if self.payload_bytes_max > self.api_body_bytes_max:
            raise ValueError(
                f"{PREFIX}PAYLOAD_BYTES_MAX={self.payload_bytes_max} cannot exceed "
                f"{PREFIX}API_BODY_BYTES_MAX={self.api_body_bytes_max}."
            )
        return self


def load_settings(**overrides: Any) -> Settings:
    """
    Read the environment and `.env`; `overrides` (from the command line) win.

    Raises:
        InvalidSettings: With one sentence per mistake, naming each variable.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise InvalidSettings([_sentence(mistake) for mistake in error.errors()]) from None


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


def _sentence(mistake: Mapping[str, Any]) -> str:
    # The value is not echoed: a URL may hold a password.
    message = str(mistake["msg"]).removeprefix("Value error, ")
    if not mistake["loc"]:
        return message
    name = PREFIX + str(mistake["loc"][0]).upper()
    return f"{name}: {message[:1].lower() + message[1:]}."
