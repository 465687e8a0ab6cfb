"""
The body of a request: of which type it may be, and reading it to its end.

What the bytes mean is `jsontext`; how many there may be is `front.limits`.
"""

from __future__ import annotations

import re

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from asyncflow.api.front.limits import LimitedReceive
from asyncflow.errors import Refusal

IGNORED_BYTES_MAX = 64 * 1024
"""Largest body of a request that needs none."""

# The grammar of RFC 9110, 8.3.1. Possessive quantifiers rule out backtracking, which would never
# finish on a long header of blanks and semicolons.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED = rb'"(?:[^"\\]|\\.)*+"'
_PARAMETER = rb"[ \t]*+;[ \t]*+(?:(%b)=(%b|%b))?+" % (_TOKEN, _TOKEN, _QUOTED)
_JSON_TYPE = re.compile(
    rb"[ \t]*+application/(?:json|[a-z0-9.+-]+\+json)((?:%b)*+)[ \t]*+" % _PARAMETER, re.I
)
_PARAMETERS = re.compile(_PARAMETER)
_UTF_8 = {b"utf-8", b"utf8"}


async def read_json_body(scope: Scope, receive: Receive) -> bytes:
    """
    The body of a request that declares it as JSON.

    Raises:
        Refusal: 408, 413 or 415.
        ClientDisconnect: The client left before the end.
    """
    _check_type(dict(scope["headers"]))
    return await _read(receive)


async def read_to_end(request: Request) -> None:
    """
    For operations that take no body: wait for the end of the request nevertheless. Half a request,
    or one whose end cannot be read, must change nothing.

    Raises:
        Refusal: 408 or 413.
        ClientDisconnect: The client left before the end.
    """
    await _read(LimitedReceive(request.scope, request.receive, IGNORED_BYTES_MAX))


async def refuse_forms(request: Request) -> None:
    """
    For operations that take no body: refuse one that an HTML form could have sent.

    Any page can make a browser send a form, and not every browser says so in a header. A JSON
    body is accepted and ignored.

    Raises:
        Refusal: 415.
    """
    headers = dict(request.scope["headers"])
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"").strip(b"0")
    if has_body and not _JSON_TYPE.fullmatch(headers.get(b"content-type", b"")):
        raise Refusal(
            "unsupported-media-type",
            "This takes no body; remove it, or send JSON with Content-Type: application/json.",
        )


async def _read(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)


def _check_type(headers: dict[bytes, bytes]) -> None:
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.strip().lower() != b"identity":
        raise Refusal(
            "unsupported-media-type",
            "Bodies must not be compressed; remove the header Content-Encoding.",
        )
    content_type = headers.get(b"content-type", b"")
    if content_type == b"application/json":
        return
    json_type = _JSON_TYPE.fullmatch(content_type)
    if json_type is None:
        raise Refusal(
            "unsupported-media-type",
            "The body must be JSON in UTF-8; send it with Content-Type: application/json.",
        )
    for name, value in _PARAMETERS.findall(json_type[1]):
        if name.lower() == b"charset" and value.strip(b'"').lower() not in _UTF_8:
            raise Refusal(
                "unsupported-media-type",
                "The body must be JSON in UTF-8, and the charset says otherwise; send it with "
                "Content-Type: application/json.",
            )
