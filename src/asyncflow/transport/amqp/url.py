"""
Parse the broker's URL. Errors repeat nothing of it but the names of parameters.

Parameters are those of RabbitMQ's own clients (https://www.rabbitmq.com/docs/uri-query-parameters)
that apply here; any other is refused by name.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from asyncflow.errors import InvalidSettings
from asyncflow.urls import UnclearUrl, address, split_url

_MISTAKE: Final = (
    "The broker URL is not of the form amqp://user:password@host:port/vhost; "
    "special characters in user, password and vhost must be percent-encoded."
)


_TLS_PARAMETERS: Final = (
    "cacertfile",
    "cafile",
    "certfile",
    "keyfile",
    "server_name_indication",
    "verify",
)
_PARAMETERS: Final = (
    "auth_mechanism",
    "channel_max",
    "connection_timeout",
    "frame_max",
    "heartbeat",
    *_TLS_PARAMETERS,
)


@dataclass(frozen=True, slots=True)
class Address:
    """
    The broker's address and our credentials; `tls` is None for a plain connection.

    As a string it is host and port, fit for logs.

    Attributes:
        tls_name: The name that the broker's certificate must have; None is `host`.
        heartbeat_seconds, timeout_seconds: None is the caller's.
        channels_max, frame_bytes_max: None is the client's own limit.
    """

    host: str
    port: int
    vhost: str
    user: str
    password: str = field(repr=False)
    tls: ssl.SSLContext | None
    tls_name: str | None = None
    heartbeat_seconds: int | None = None
    timeout_seconds: float | None = None
    channels_max: int | None = None
    frame_bytes_max: int | None = None

    def __str__(self) -> str:
        return address(self.host, self.port)


def parse_url(url: str) -> Address:
    """
    The address in an `amqp://` or `amqps://` URL, with RabbitMQ's defaults for what it omits.

    Raises:
        InvalidSettings: The URL is malformed, has an unknown parameter, or names a
            certificate file that cannot be read.
    """
    try:
        parts = split_url(url)
    except UnclearUrl:
        raise InvalidSettings([_MISTAKE]) from None
    secure = parts.scheme == "amqps"
    host, port = parts.hosts[0]
    if parts.scheme not in ("amqp", "amqps") or not host or len(parts.hosts) > 1:
        raise InvalidSettings([_MISTAKE])
    options = dict(parts.parameters)
    if not all(name.isidentifier() for name in options):
        # It may be what follows an unescaped question mark in a password.
        raise InvalidSettings([_MISTAKE])
    _check_parameters(options, secure=secure)
    return Address(
        host=host,
        port=port or (5671 if secure else 5672),
        vhost=parts.path or "/",
        user=parts.user or "guest",
        password=parts.password or "guest",
        tls=_tls_context(options) if secure else None,
        tls_name=options.get("server_name_indication"),
        heartbeat_seconds=_whole_number(options, "heartbeat", 1, 600),
        timeout_seconds=_seconds(_whole_number(options, "connection_timeout", 1, 300_000)),
        channels_max=_whole_number(options, "channel_max", 8, 65_535),
        frame_bytes_max=_whole_number(options, "frame_max", 8_192, 2**31),
    )


def _check_parameters(options: Mapping[str, str], *, secure: bool) -> None:
    mistakes = []
    for name in sorted(options.keys() - set(_PARAMETERS)):
        known = ", ".join(_PARAMETERS)
        mistakes.append(f"The broker URL has an unknown parameter {name}; AsyncFlow knows {known}.")
    if not secure:
        for name in sorted(options.keys() & set(_TLS_PARAMETERS)):
            mistakes.append(f"{name} in the broker URL needs a URL that begins with amqps://.")
    if options.get("auth_mechanism", "plain").lower() != "plain":
        mistakes.append("auth_mechanism in the broker URL must be plain.")
    if "keyfile" in options and "certfile" not in options:
        mistakes.append("keyfile in the broker URL needs certfile as well.")
    if mistakes:
        raise InvalidSettings(mistakes)


def _whole_number(options: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = options.get(name)
    if text is None:
        return None
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 12 else -1
    if not low <= number <= high:
        unit = {"heartbeat": " of seconds", "connection_timeout": " of milliseconds"}.get(name, "")
        raise InvalidSettings(
            [f"{name} in the broker URL must be a whole number{unit} from {low} to {high}."]
        )
    return number


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1_000


def _tls_context(options: Mapping[str, str]) -> ssl.SSLContext:
    verify = options.get("verify", "true")
    if verify not in ("true", "false", "verify_peer", "verify_none"):
        raise InvalidSettings(
            ["verify in the broker URL must be true, false, verify_peer or verify_none."]
        )
    try:
        cafile = options.get("cafile", options.get("cacertfile"))
        context = ssl.create_default_context(cafile=cafile)
    except OSError as error:
        raise InvalidSettings([_unreadable("cafile", error)]) from error
    if "certfile" in options:
        try:
            # A key with a passphrase would otherwise be asked for on the terminal.
            context.load_cert_chain(options["certfile"], options.get("keyfile"), password="")
        except OSError as error:
            raise InvalidSettings([_unreadable("certfile or keyfile", error)]) from error
    if verify in ("false", "verify_none"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _unreadable(parameter: str, error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"The broker URL's {parameter} cannot be read: {reason}."
