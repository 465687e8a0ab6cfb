"""
The HTTP application, put together from what it is given.

No settings are read here and nothing is opened: `processes` owns the database, the
catalogue's refreshing and the server.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncflow.api.catalogue import Catalogue
from asyncflow.api.docs import add_docs_routes
from asyncflow.api.gate import Gate
from asyncflow.api.guard import Guard
from asyncflow.api.health import add_health_routes
from asyncflow.api.openapi import DESCRIPTION, TAGS, describe
from asyncflow.api.problems import Answering, install_problems
from asyncflow.api.submissions import Submissions
from asyncflow.api.tasks import add_task_routes
from asyncflow.errors import InvalidSettings
from asyncflow.settings import Settings
from asyncflow.store.database import Executor
from asyncflow.store.wakeups import Waker


def create_app(
    db: Executor,
    settings: Settings,
    *,
    catalogue: Catalogue,
    waker: Waker,
    version: str,
) -> FastAPI:
    """
    The AsyncFlow API over an opened database.

    Args:
        catalogue: Entered by the caller, so that it stays fresh.
        waker: Closed by the caller, after the server has stopped.
        version: AsyncFlow's, shown in the API's description.
    """
    gate = Gate(
        listens_on=settings.api_host,
        hosts=settings.api_hosts,
        origins=settings.api_cors_origins,
    )
    app = _Api(
        prefix=settings.api_root_path,
        title="AsyncFlow",
        version=version,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    submissions = Submissions(
        db,
        catalogue,
        waker,
        body_bytes_max=settings.api_body_bytes_max,
        payload_bytes_max=settings.payload_bytes_max,
        root_path=settings.api_root_path,
    )
    app.serve_directly(Route("/tasks", submissions, methods=["POST"]), gate)
    app.add_route("/tasks/batch", submissions.submit_batch, ["POST"], include_in_schema=False)
    add_task_routes(app, db, waker, through_relay=settings.broker_url is not None)
    add_health_routes(app, db, through_relay=settings.broker_url is not None)
    add_docs_routes(app)
    install_problems(app)
    app.add_middleware(Guard, gate=gate)
    _check_root_path(app, settings.api_root_path)
    return app


class _Api(FastAPI):
    """
    FastAPI, with a short way around it for what is asked most.

    Args:
        prefix: The path under which a proxy serves it; "" is none. Whether the proxy takes it
            off or leaves it on does not matter.
    """

    def __init__(self, *, prefix: str, **extra: Any) -> None:
        super().__init__(**extra)
        self._prefix = prefix
        self._direct: dict[tuple[str, str], ASGIApp] = {}

    def serve_directly(self, route: Route, gate: Gate) -> None:
        """
        Serve a route of a fixed path that reads and checks its requests by itself.

        What FastAPI and Starlette do on the way to a route (three layers for errors, body
        limits, telemetry, exit stacks, matching) is a third of the API's CPU per submission,
        and such a route needs none of it: `Guard` and `Answering` do their part. It is a
        route like any other where routes are looked up, for other methods and spellings.
        """
        self.router.routes.append(route)
        for method in route.methods or ():
            self._direct[method, route.path] = Guard(Answering(route.app), gate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if self._prefix:
            path = self._without_prefix(path)
            scope = {**scope, "root_path": self._prefix, "path": self._prefix + path}
        direct = self._direct.get((scope.get("method", ""), path))
        await (direct or super().__call__)(scope, receive, send)

    def _without_prefix(self, path: str) -> str:
        if path == self._prefix:
            return "/"
        has_prefix = path.startswith(f"{self._prefix}/")
        return path.removeprefix(self._prefix) if has_prefix else path

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = describe(self)
        return self.openapi_schema


def _check_root_path(app: FastAPI, root_path: str) -> None:
    first = f"/{root_path[1:].partition('/')[0]}"
    if root_path and any(f"{route.path}/".startswith(f"{first}/") for route in app.routes):  # type: ignore[attr-defined]
        # It could not be told whether a proxy has taken it off.
        raise InvalidSettings(
            [f"ASYNCFLOW_API_ROOT_PATH: it must not begin with {first}, which is the API's own."]
        )


def _operation_id(route: APIRoute) -> str:
    return route.name
