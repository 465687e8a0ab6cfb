"""
The `Host` and `Origin` headers that are accepted.

A browser lets any web page send requests to any address, this machine's included, under the name
that the page was loaded from. Two rules keep such a page from driving an API that has no
authentication:

- `Host` names this server. A page that points its own domain at our address ("DNS rebinding") is
  same-origin to the browser and can read every answer, but it cannot change its name.
- A request that changes something does not come from another site. Browsers send its source in
  `Origin` and `Sec-Fetch-Site`, which pages cannot forge; other clients send neither.

A header that clients rely on is not ignored, either: `Idempotency-Key`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from re import compile as pattern

from starlette.types import ASGIApp, Receive, Scope, Send

from asyncflow.errors import Refusal

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

_OF_CHANGES = frozenset({b"origin", b"sec-fetch-site", b"idempotency-key"})
_AUTHORITY = pattern(r"(\[[^\[\]]+\]|[^:\[\]]+)(?::[0-9]{0,5})?")
_SHOWN_LENGTH_MAX = 100


class Gated:
    """
    Lets through to `app` what passes `gate`.
    """

    def __init__(self, app: ASGIApp, *, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """
        Serve one request.
        """
        self._gate.check(scope)
        return self._app(scope, receive, send)


class Gate:
    """
    The rules above, for one server.

    Args:
        listens_on: The address or name the server listens on. If that is every address, any
            address is accepted as `Host`, but not any name: a rebinding page needs a name.
        hosts: Further names and addresses of the server; "*" accepts any.
        origins: Other sites whose pages may change something; "*" accepts any.
    """

    def __init__(self, *, listens_on: str, hosts: Iterable[str], origins: Iterable[str]) -> None:
        names = {"localhost", *(_bare(host) for host in (listens_on, *hosts))}
        self._names = names
        self._addresses = {address for name in names if (address := _address(name))}
        self._answers_to_any_name = "*" in names
        self._answers_to_any_address = any(a.is_unspecified for a in self._addresses)
        self._origins = frozenset(origin.lower() for origin in origins)
        # Every request asks, and clients repeat themselves.
        self._answers_to = lru_cache(maxsize=64)(self._is_named_by)

    def check(self, scope: Scope) -> None:
        """
        Return if the request may go on.

        Raises:
            Refusal: 403, 421 or 501.
        """
        says_more = False
        for name, value in scope["headers"]:
            if name == b"host":
                if not self._answers_to(value):
                    raise _misdirected(value)
            elif name in _OF_CHANGES:
                says_more = True
        if says_more and scope["method"] not in SAFE_METHODS:
            self._check_change(scope["headers"])

    def _is_named_by(self, host: bytes) -> bool:
        # Browsers always send a host; old health checks do not.
        if not host or self._answers_to_any_name:
            return True
        authority = _AUTHORITY.fullmatch(host.decode("latin-1"))
        if authority is None:
            return False
        name = _bare(authority[1])
        if name in self._names:
            return True
        address = _address(name)
        return address is not None and (
            self._answers_to_any_address or address.is_loopback or address in self._addresses
        )

    def _check_change(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        told: dict[bytes, set[str]] = {}
        for name, value in headers:
            told.setdefault(name, set()).add(value.decode("latin-1").strip().lower())
        if self._is_cross_site(told):
            origins = ", ".join(sorted(told.get(b"origin", ()))) or "another site"
            raise Refusal(
                "cross-site",
                f"The request comes from a page of {_shown(origins)}; other sites may only read. "
                "To allow an origin, add it to ASYNCFLOW_API_CORS_ORIGINS.",
            )
        if b"idempotency-key" in told:
            raise Refusal(
                "idempotency-key-unsupported",
                "Idempotency-Key is not supported yet: a repeated request would submit a second "
                "task. Remove the header. Nothing was done.",
            )

    def _is_cross_site(self, told: dict[bytes, set[str]]) -> bool:
        origins = told.get(b"origin", set())
        if origins and ("*" in self._origins or origins <= self._origins):
            return False
        if sites := told.get(b"sec-fetch-site"):
            # The browser's own verdict; it holds even if a proxy has changed `Host`.
            return not sites <= {"same-origin", "none"}
        hosts = told.get(b"host", set()) - {""}
        return any(_authority_of(origin) not in hosts for origin in origins)


def _authority_of(origin: str) -> str:
    scheme, _, authority = origin.partition("://")
    return authority.removesuffix({"http": ":80", "https": ":443"}.get(scheme, ""))


def _bare(host: str) -> str:
    return host.lower().strip("[]").removesuffix(".")


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _misdirected(host: bytes) -> Refusal:
    shown = _shown(host.decode("latin-1"))
    return Refusal(
        "misdirected",
        f"This server does not answer to the host {shown!r}. To accept that name, add it, without "
        "a port, to ASYNCFLOW_API_HOSTS.",
    )


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_LENGTH_MAX else text[:_SHOWN_LENGTH_MAX] + "…"
