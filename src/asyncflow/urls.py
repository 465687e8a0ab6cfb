"""
Parses URLs of servers strictly, so that no part of a password is taken for anything else.

A special character in a password that is not percent-encoded shifts the parts of a URL: after
`:a@b` the host is `b…`, after `:a/b` the port is `a`. Programs that accept such a URL print
parts of the password as a host, a port or a parameter. So a URL must be unambiguous: at most one
`@`, none after the host, no `#`, no brackets except around a host, and every `%` starts an
escape. Any other URL is refused, with a sentence that quotes nothing from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

_BLANK = re.compile(r"[\x00-\x20\x7f]")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")
_HOST = re.compile(r"(?P<name>[^\[\]:]*|\[[0-9A-Fa-f:.%]+\])(?::(?P<port>[0-9]{0,5}))?")


class UnclearUrl(ValueError):
    """
    A URL whose parts are ambiguous, or a text that is not a URL.
    """


@dataclass(frozen=True, slots=True)
class Parts:
    """
    A URL's parts, decoded.

    Attributes:
        user, password: None if the URL has none.
        hosts: Hosts and their ports; an empty string and None where the URL names none.
        authority: User, password, hosts and ports as written in the URL.
        path: Without the leading slash.
        parameters: Of the query; the last one of each name.
    """

    scheme: str
    user: str | None
    password: str | None = field(repr=False)
    hosts: tuple[tuple[str, int | None], ...]
    authority: str = field(repr=False)
    path: str
    parameters: Mapping[str, str] = field(repr=False)


def split_url(url: str) -> Parts:
    """
    Split a server's URL into its parts.

    Raises:
        UnclearUrl: It is not a URL, or a special character in it is not percent-encoded.
    """
    _check_characters(url)
    scheme, separator, rest = url.partition("://")
    authority = re.split("[/?]", rest, maxsplit=1)[0]
    if not separator or rest.count("@") > authority.count("@") or authority.count("@") > 1:
        raise UnclearUrl
    user_info, at, hosts = authority.rpartition("@")
    if "[" in user_info or "]" in user_info:
        raise UnclearUrl
    user, colon, password = user_info.partition(":")
    path, _, query = rest[len(authority) :].partition("?")
    return Parts(
        scheme=scheme,
        user=unquote(user) if at else None,
        password=unquote(password) if colon else None,
        hosts=tuple(_host(host) for host in hosts.split(",")),
        authority=authority,
        path=unquote(path[1:]),
        parameters=dict(_parameter(text) for text in query.split("&") if text),
    )


def masked(url: str) -> str:
    """
    `url` for a log or a screen: `***` replaces its password, if any.

    If it is unclear where the password ends, only the scheme is shown.
    """
    try:
        parts = split_url(url)
    except UnclearUrl:
        scheme = re.match("[a-z]+://", url)
        return f"{scheme[0] if scheme else ''}***"
    shown = re.sub(r"([?&](?:ssl)?password=)[^&]*", r"\1***", url)
    if parts.password is None:
        return shown
    user, _, hosts = parts.authority.rpartition("@")
    hidden = f"{user.partition(':')[0]}:***@{hosts}"
    return shown.replace(parts.authority, hidden, 1)


def _check_characters(url: str) -> None:
    if _BLANK.search(url) or _BAD_ESCAPE.search(url) or "#" in url:
        raise UnclearUrl
    try:
        unquote(url, errors="strict").encode()
        # Refuses characters that some programs treat as `/`, `@` or `:`. Its error quotes them.
        urlsplit(url)
    except ValueError:
        raise UnclearUrl from None


def _host(text: str) -> tuple[str, int | None]:
    found = _HOST.fullmatch(text)
    port = int(found["port"]) if found and found["port"] else None
    if found is None or port == 0 or (port or 0) > 65_535:
        raise UnclearUrl
    return unquote(found["name"].strip("[]")), port


def _parameter(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UnclearUrl
    return unquote(name), unquote(value)


def address(host: str, port: int) -> str:
    """
    A host and a port as written in a URL: an IPv6 address is put in brackets.
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
