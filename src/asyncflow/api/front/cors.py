"""
The headers that let web pages of other origins use the API (Fetch, "CORS protocol"). Off unless
origins are set; then it costs nothing.

They are added to every answer, including problems and the answers to OPTIONS, with which a browser
asks beforehand ("preflight"); every path answers OPTIONS anyway. Whether a page may change
something is decided by `gate`: a browser sends simple requests without asking.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXPOSED = b"allow, location, retry-after"
METHODS = b"GET, HEAD, POST"
MAX_AGE_SECONDS = 600
"""How long a browser may cache the answer to a preflight."""


def with_cors(app: ASGIApp, *, origins: tuple[str, ...]) -> ASGIApp:
    """
    Let pages of `origins` use `app`; "*" is any. Without origins it is `app` itself.
    """
    return _Cors(app, origins) if origins else app


class _Cors:
    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app = app
        self._allows_any = "*" in origins
        self._origins = frozenset(origin.lower().encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        added = self._headers_for(dict(scope["headers"]), scope["method"])

        async def adding(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        await self._app(scope, receive, adding)

    def _headers_for(self, asked: dict[bytes, bytes], method: str) -> list[tuple[bytes, bytes]]:
        if self._allows_any:
            allowed, headers = b"*", []
        else:
            # Answers differ by it, so a cache must not give one page's answer to another, nor what
            # it got without an origin.
            allowed, headers = asked.get(b"origin", b""), [(b"vary", b"Origin")]
            if allowed.lower() not in self._origins:
                return headers
        headers += [
            (b"access-control-allow-origin", allowed),
            (b"access-control-expose-headers", EXPOSED),
        ]
        if method == "OPTIONS" and b"access-control-request-method" in asked:
            headers += [
                (b"access-control-allow-methods", METHODS),
                (b"access-control-max-age", b"%d" % MAX_AGE_SECONDS),
                (b"vary", b"Access-Control-Request-Headers"),
            ]
            if wanted := asked.get(b"access-control-request-headers"):
                headers.append((b"access-control-allow-headers", wanted))
        return headers
