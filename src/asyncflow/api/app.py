"""
The HTTP application: every route, behind the front that every request passes.

No settings are read here and nothing is opened: `processes` owns the database, the
catalogue's refreshing and the server.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.middleware import Middleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncflow.api.catalogue import Catalogue
from asyncflow.api.dependencies import Parts
from asyncflow.api.front.answers import Answers
from asyncflow.api.front.authentication import Authentication
from asyncflow.api.front.cors import with_cors
from asyncflow.api.front.gate import Gate, Gated
from asyncflow.api.front.limits import BODY_SECONDS_MAX, Limits
from asyncflow.api.front.root_path import route_path, with_root_path
from asyncflow.api.openapi import DESCRIPTION, TAGS, describe
from asyncflow.api.routes import batches, docs, health, tasks
from asyncflow.api.routes.submissions import SubmitTaskEndpoint
from asyncflow.api.submissions import Submissions
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
    body_seconds_max: float = BODY_SECONDS_MAX,
) -> FastAPI:
    """
    The AsyncFlow API over an opened database.

    Args:
        catalogue: Entered by the caller, so that it stays fresh.
        waker: Closed by the caller, after the server has stopped.
        version: AsyncFlow's, shown in the API's description.
        body_seconds_max: How long a request's body may take to arrive.
    """
    submissions = Submissions(db, catalogue, waker, payload_bytes_max=settings.payload_bytes_max)
    app = _Api(version, front=_front(settings, body_seconds_max))
    app.state.parts = Parts(db, waker, submissions, through_relay=settings.broker_url is not None)
    app.serve_directly(Route("/tasks", SubmitTaskEndpoint(submissions), methods=["POST"]))
    for router in (batches.router, tasks.router, health.router, docs.router):
        # `include_router` would nest them: each request would be matched twice, and the paths and
        # methods that `unrouted` looks up would be hidden.
        app.router.routes += router.routes
    _check_root_path(app, settings.api_root_path)
    return app


def _front(settings: Settings, body_seconds_max: float) -> list[Middleware]:
    """
    What every request passes on its way to a route, in this order.

    A step in front of `Answers` sees the final status of every response: tracing belongs there.
    One behind it may raise any error of ours, and it becomes a problem document.
    """
    gate = Gate(
        listens_on=settings.api_host,
        hosts=settings.api_hosts,
        origins=settings.api_cors_origins,
    )
    return [
        Middleware(with_root_path, prefix=settings.api_root_path),
        Middleware(with_cors, origins=settings.api_cors_origins),
        Middleware(Answers),
        Middleware(Limits, bytes_max=settings.api_body_bytes_max, seconds_max=body_seconds_max),
        Middleware(Gated, gate=gate),
        Middleware(Authentication),
    ]


class _Api(FastAPI):
    """
    FastAPI's routes and description behind a front of our own.

    FastAPI's layers on the way to its router (telemetry, three for errors, body limits) are a
    third of the API's CPU per submission; the front does their part in one way for every route.
    """

    def __init__(self, version: str, *, front: list[Middleware]) -> None:
        super().__init__(
            title="AsyncFlow",
            version=version,
            description=DESCRIPTION,
            openapi_tags=TAGS,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        self.direct: dict[tuple[str, str], ASGIApp] = {}
        self._routed = AsyncExitStackMiddleware(self.router)
        self._served: ASGIApp = self._route
        for step, args, kwargs in reversed(front):
            self._served = step(self._served, *args, **kwargs)

    def serve_directly(self, route: Route) -> None:
        """
        Serve a route of a fixed path without looking it up in the router.

        It is a route like any other where routes are listed.
        """
        self.router.routes.append(route)
        for method in route.methods or ():
            self.direct[method, route.path] = route.app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        scope["app"] = self
        await self._served(scope, receive, send)

    def _route(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        direct = self.direct.get((scope["method"], route_path(scope)))
        return (direct or self._routed)(scope, receive, send)

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
