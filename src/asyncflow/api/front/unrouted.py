"""
Answers to requests that no route takes: 404 with a hint, 405 with the methods of the path.
"""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from asyncflow.api.front.root_path import route_path
from asyncflow.api.problems import problem


def not_found(scope: Scope) -> Response:
    """
    404, with the path that was probably meant.
    """
    path = scope["path"]
    return problem("not-found", f"There is nothing at {path}{_hint(scope)}", path)


def method_not_allowed(scope: Scope) -> Response:
    """
    405, or the answer to OPTIONS; both list the methods of the path.
    """
    allow = ", ".join(sorted(_allowed_methods(scope)))
    method, path = scope["method"], scope["path"]
    if method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": allow})
    detail = f"{path} does not support {method}, only {allow}."
    return problem("method-not-allowed", detail, path, headers={"Allow": allow})


def _hint(scope: Scope) -> str:
    # Not a redirect: many clients would follow it with a GET, and a submission would be a list.
    root_path = scope.get("root_path", "")
    path = "/".join(["", *filter(None, route_path(scope).lower().split("/"))])
    other = {**scope, "path": root_path + path}
    found = path != "/" and any(r.matches(other)[0] is not Match.NONE for r in scope["app"].routes)
    return f"; did you mean {root_path}{path}?" if found else "."


def _allowed_methods(scope: Scope) -> set[str]:
    # Starlette's own answer names the first matching route only. A path of its own, such as
    # /tasks/batch, is not also an id.
    matching = [r for r in scope["app"].routes if r.matches(scope)[0] is not Match.NONE]
    exact = [route for route in matching if route.path == route_path(scope)]
    methods = {"OPTIONS"}.union(*(route.methods for route in exact or matching))
    return methods | {"HEAD"} if "GET" in methods else methods
