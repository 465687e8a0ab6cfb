"""
The broker's URL taken apart. No part of it is ever repeated in an error.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final

from asyncflow.errors import InvalidSettings
from asyncflow.urls import UnclearUrl, address, split_url

_MISTAKE: Final = (
    "The broker URL is not of the form amqp://user:password@host:port/vhost; "
    "special characters in user, password and vhost must be percent-encoded."
)


@dataclass(frozen=True, slots=True)
class Address:
    """
    Where the broker is and who we are to it; `tls` is None for a plain connection.

    As a string it is host and port, fit for logs.
    """

    host: str
    port: int
    vhost: str
    user: str
    password: str = field(repr=False)
    tls: ssl.SSLContext | None

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
    if options and not (secure and options.keys() <= {"cafile", "verify"}):
        raise InvalidSettings(["The broker URL may have only cafile and verify, and with amqps."])
    return Address(
        host=host,
        port=port or (5671 if secure else 5672),
        vhost=parts.path or "/",
        user=parts.user or "guest",
        password=parts.password or "guest",
        tls=_tls_context(options) if secure else None,
    )


def _tls_context(options: dict[str, str]) -> ssl.SSLContext:
    verify = options.get("verify", "true")
    if verify not in ("true", "false"):
        raise InvalidSettings(["verify in the broker URL must be true or false."])
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InvalidSettings([f"The broker URL's cafile cannot be read: {reason}."]) from error
    if verify == "false":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
