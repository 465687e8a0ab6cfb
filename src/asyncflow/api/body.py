"""
The bytes of a request: what type they may be, how many, and how long to wait for them.

What they mean is `jsontext`. Bytes are counted as they arrive; what Content-Length
promises is believed only when it is already too much.
"""

from __future__ import annotations

import asyncio
import contextlib
import re

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope

from asyncflow.errors import Refusal

BODY_SECONDS_MAX = 30.0
"""How long a body may take to arrive; a server that waits for ever can be held for ever."""

DISCARD_SECONDS_MAX = 1.0
"""How long the rest of a body that is too large is read and thrown away."""

IGNORED_BYTES_MAX = 64 * 1024
"""Largest body where none is needed."""

# The grammar of RFC 9110, 8.3.1. What has been matched is not tried again in another way: a long
# header of blanks and semicolons would never finish.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED = rb'"(?:[^"\\]|\\.)*+"'
_PARAMETER = rb"[ \t]*+;[ \t]*+(?:(%b)=(%b|%b))?+" % (_TOKEN, _TOKEN, _QUOTED)
_JSON_TYPE = re.compile(
    rb"[ \t]*+application/(?:json|[a-z0-9.+-]+\+json)((?:%b)*+)[ \t]*+" % _PARAMETER, re.I
)
_PARAMETERS = re.compile(_PARAMETER)
_UTF_8 = {b"utf-8", b"utf8"}


async def read_json_body(scope: Scope, receive: Receive, *, bytes_max: int) -> bytes:
    """
    All bytes of a request that claims to carry JSON.

    Raises:
        Refusal: 408, 413 or 415.
        ClientDisconnect: The client left before the end.
    """
    headers = dict(scope["headers"])
    _check_type(headers)
    return await _read(headers, receive, bytes_max)


async def read_to_end(request: Request) -> None:
    """
    For operations that take no body: wait for the end of the request all the same. Half a request,
    or one whose end cannot be read, must change nothing.

    Raises:
        Refusal: 408 or 413.
        ClientDisconnect: The client left before the end.
    """
    await _read(dict(request.scope["headers"]), request.receive, IGNORED_BYTES_MAX)


async def _read(headers: dict[bytes, bytes], receive: Receive, bytes_max: int) -> bytes:
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            if not _promises_too_much(headers, bytes_max):
                return await _received(receive, bytes_max)
    except TimeoutError:
        raise Refusal(
            "request-timeout",
            f"The body did not arrive within {BODY_SECONDS_MAX:g} seconds.",
            headers={"Connection": "close"},
        ) from None
    except _TooLarge:
        pass
    if headers.get(b"expect") is None:
        await _discard(receive)
    # What the client still sends would be read as its next request.
    raise Refusal(
        "body-too-large",
        f"The body is too large; at most {bytes_max} bytes are taken.",
        headers={"Connection": "close"},
    )


def _check_type(headers: dict[bytes, bytes]) -> None:
    encoding = headers.get(b"content-encoding", b"identity")
    if encoding.strip().lower() != b"identity":
        raise Refusal(
            "unsupported-media-type",
            "Bodies must not be compressed; leave Content-Encoding out.",
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
                "The body must be JSON in UTF-8, which no charset but utf-8 means; send it with "
                "Content-Type: application/json.",
            )


async def refuse_forms(request: Request) -> None:
    """
    For operations that take no body: refuse one that an HTML form could have sent.

    Any page can make a browser send a form, and not every browser says that it did. A body
    that is JSON is left unread.

    Raises:
        Refusal: 415.
    """
    headers = dict(request.scope["headers"])
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"").strip(b"0")
    if has_body and not _JSON_TYPE.fullmatch(headers.get(b"content-type", b"")):
        raise Refusal(
            "unsupported-media-type",
            "This takes no body; leave it out, or send JSON with Content-Type: application/json.",
        )


def _promises_too_much(headers: dict[bytes, bytes], bytes_max: int) -> bool:
    length = headers.get(b"content-length", b"0")
    return length.isdigit() and (len(length) > 18 or int(length) > bytes_max)


class _TooLarge(Exception):
    """
    More bytes than are taken.
    """


async def _received(receive: Receive, bytes_max: int) -> bytes:
    body = b""
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body = message.get("body", b"")
        size += len(body)
        if size > bytes_max:
            raise _TooLarge
        chunks.append(body)
        more = message.get("more_body", False)
    return body if len(chunks) == 1 else b"".join(chunks)


async def _discard(receive: Receive) -> None:
    # A client that is still sending would see a reset connection and never our answer.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS_MAX):
            while (await receive()).get("more_body"):
                pass
