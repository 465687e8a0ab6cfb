"""
The rules for the head of a request beyond those that the parser checks, so that we and every proxy
before us read the same request (RFC 9112).

Pure functions: `protocol` reads heads, applies the rules, and answers.
"""

from __future__ import annotations

import re

from asyncflow.errors import Refusal

TARGET_BYTES_MAX = 32 * 1024
"""Longest path and query of a request."""

Headers = list[tuple[bytes, bytes]]
"""Names in lower case."""

# Two lines of one of these could be read in two ways. The parser refuses two lengths itself.
_ONCE = frozenset(
    (
        b"authorization",
        b"content-encoding",
        b"content-type",
        b"expect",
        b"host",
        b"origin",
        b"transfer-encoding",
    )
)
_ABSOLUTE = re.compile(rb"https?://([^/?@]+)([/?].*)?", re.I)


def check_head(target: bytes, version: str, headers: Headers) -> bytes:
    """
    Return the path and query that `target` means, or refuse the request.

    If the target names a host, it replaces the one in `headers`.

    Raises:
        Refusal: 400, 501 or 505.
    """
    by_name = dict(headers)
    if len(by_name) < len(headers):
        _check_repetitions(headers)
    if version != "1.1":
        _check_old_version(version, by_name)
    elif b"host" not in by_name:
        raise malformed("the Host header is missing")
    if b"transfer-encoding" in by_name:
        _check_coding(by_name[b"transfer-encoding"])
    if not target.startswith(b"/"):
        target = _without_host(target, headers)
    if b"#" in target:
        raise malformed("its target has a fragment")
    return target


def head_bytes(target: bytes, headers: Headers) -> int:
    """
    The approximate size of a head.
    """
    return len(target) + sum(len(name) + len(value) + 4 for name, value in headers)


def head_without_offer(method: bytes, target: bytes, version: str, headers: Headers) -> bytes:
    """
    The head, without its offer to upgrade to another protocol.
    """
    lines = [b"%b %b HTTP/%b" % (method, target, version.encode())]
    lines += [b"%b: %b" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join([*lines, b"", b""])


def malformed(reason: str) -> Refusal:
    """
    400, with the reason, which completes a sentence.
    """
    return Refusal("malformed-request", f"The request is not valid HTTP/1.1: {reason}.")


def _check_repetitions(headers: Headers) -> None:
    seen: set[bytes] = set()
    for name, _ in headers:
        if name in seen and name in _ONCE:
            raise malformed(f"it has more than one {name.decode().title()} header")
        seen.add(name)


def _check_old_version(version: str, by_name: dict[bytes, bytes]) -> None:
    if version != "1.0":
        raise unknown_version()
    if b"transfer-encoding" in by_name:
        raise malformed("HTTP/1.0 has no Transfer-Encoding")


def unknown_version() -> Refusal:
    """
    505: the rest of the head cannot be interpreted.
    """
    return Refusal("http-version", "This server supports HTTP/1.1 and HTTP/1.0.")


def _check_coding(coding: bytes) -> None:
    coding = coding.lower()
    if coding == b"chunked":
        return
    if coding.rpartition(b",")[2].strip() != b"chunked":
        raise malformed("its Transfer-Encoding does not end in chunked")
    raise Refusal("not-implemented", "The only supported Transfer-Encoding is chunked.")


def _without_host(target: bytes, headers: Headers) -> bytes:
    if target == b"*":
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise malformed("its target is neither a path nor an http URL")
    host, rest = absolute.group(1), absolute.group(2) or b"/"
    headers[:] = [header for header in headers if header[0] != b"host"]
    headers.append((b"host", host))
    return rest if rest[:1] == b"/" else b"/" + rest
