"""
The path under which a proxy serves the API. Whether the proxy strips it or not does not matter.
"""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.types import ASGIApp, Receive, Scope, Send


def with_root_path(app: ASGIApp, *, prefix: str) -> ASGIApp:
    """
    Serve `app` under `prefix`, as its root path. Without a prefix it is `app` itself.
    """
    return _UnderPrefix(app, prefix) if prefix else app


def route_path(scope: Scope) -> str:
    """
    The path of a request as routes know it.
    """
    path: str = scope["path"]
    root_path = scope.get("root_path")
    return path.removeprefix(root_path) if root_path else path


class _UnderPrefix:
    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        path = self._prefix + self._without_prefix(scope["path"])
        return self._app({**scope, "root_path": self._prefix, "path": path}, receive, send)

    def _without_prefix(self, path: str) -> str:
        if path == self._prefix:
            return "/"
        has_prefix = path.startswith(f"{self._prefix}/")
        return path.removeprefix(self._prefix) if has_prefix else path
