"""
The bytes of a request: what type they may be, how many, and how long to wait for them.

What they mean is `strict_json`. Bytes are counted as they arrive; what Content-Length
promises is believed only when it is already too much.
"""

from __future__ import annotations

import asyncio
import re

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from asyncflow.api.problems import Refusal

BODY_SECONDS_MAX = 30.0
"""How long a body may take to arrive; a server that waits for ever can be held for ever."""

_JSON_TYPE = re.compile(
    rb'\s*application/(?:json|[a-z0-9.+-]+\+json)\s*(?:;\s*charset\s*=\s*"?utf-?8"?\s*)?', re.I
)


async def read_json_body(scope: Scope, receive: Receive, *, bytes_max: int) -> bytes:
    """
    All bytes of a request that claims to carry JSON.

    Raises:
        Refusal: 408, 413 or 415.
        ClientDisconnect: The client left before the end.
    """
    _check_headers(scope, bytes_max)
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            return await _received(receive, bytes_max)
    except TimeoutError:
        raise Refusal(
            "request-timeout",
            f"The body did not arrive within {BODY_SECONDS_MAX:g} seconds.",
            headers={"Connection": "close"},
        ) from None


def _check_headers(scope: Scope, bytes_max: int) -> None:
    content_type = b""
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise Refusal(
                "unsupported-media-type",
                "Bodies must not be compressed; leave Content-Encoding out.",
            )
        elif name == b"content-length" and value.isdigit() and int(value[:20]) > bytes_max:
            raise _too_large(bytes_max)
    if content_type != b"application/json" and not _JSON_TYPE.fullmatch(content_type):
        raise Refusal(
            "unsupported-media-type",
            "The body must be JSON in UTF-8; send it with Content-Type: application/json.",
        )


async def _received(receive: Receive, bytes_max: int) -> bytes:
    message = await receive()
    body: bytes = message.get("body", b"")
    if message["type"] == "http.request" and not message.get("more_body"):
        if len(body) > bytes_max:
            raise _too_large(bytes_max)
        return body
    chunks = bytearray(body)
    while message["type"] == "http.request" and message.get("more_body"):
        if len(chunks) > bytes_max:
            raise _too_large(bytes_max)
        message = await receive()
        chunks += message.get("body", b"")
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    if len(chunks) > bytes_max:
        raise _too_large(bytes_max)
    return bytes(chunks)


def _too_large(bytes_max: int) -> Refusal:
    # What the client still sends would be read as its next request.
    return Refusal(
        "body-too-large",
        f"The body is too large; at most {bytes_max} bytes are taken.",
        headers={"Connection": "close"},
    )
