"""
URLs of servers, taken apart so that no piece of a password can be taken for anything else.

A special character in a password that is not percent-encoded moves the borders of a URL: after
`:a@b` the host is `b…`, after `:a/b` the port is `a`. Programs that go on from there print
pieces of the password as a host, a port or a parameter. So the borders must be beyond doubt: one
`@` at most, none of it behind the host, no `#`, no brackets but a host's, every `%` an escape.
A URL that is not like this is refused with a sentence that repeats nothing of it.
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
    A URL whose parts cannot be told apart beyond doubt, or that is not one.
    """


@dataclass(frozen=True, slots=True)
class Parts:
    """
    A URL's parts, decoded.

    Attributes:
        user, password: None if the URL has none.
        hosts: With their ports; both empty or None where the URL says nothing.
        authority: User, password, hosts and ports as they stand in the URL.
        path: Without the slash that begins it.
        parameters: Of the query; of several with one name, the last.
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
    Take a URL of a server apart.

    Raises:
        UnclearUrl: It is none, or a special character in it is not percent-encoded.
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
    `url` fit for a log or a screen: its password, if any, reads `***`.

    Where it is unclear what the password is, nothing is shown.
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
        # Refuses characters that some programs take for `/`, `@` or `:`, and quotes them.
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
    A host and a port as they are written in a URL: an IPv6 address has brackets.
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
