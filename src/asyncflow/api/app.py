"""
The HTTP application, put together from what it is given.

No settings are read here and nothing is opened: `processes` owns the database, the
catalogue's refreshing and the server.
"""

from __future__ import annotations

from collections.abc import Callable
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
    broker_state: Callable[[], str | None] = lambda: None,
) -> FastAPI:
    """
    The AsyncFlow API over an opened database.

    Args:
        catalogue: Entered by the caller, so that it stays fresh.
        waker: Closed by the caller, after the server has stopped.
        version: AsyncFlow's, shown in the API's description.
        broker_state: What RabbitMQ is like now, for people; None if it is not used.
    """
    gate = Gate(
        listens_on=settings.api_host,
        hosts=settings.api_hosts,
        origins=settings.api_cors_origins,
    )
    app = _Api(
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
    )
    app.serve_directly(Route("/tasks", submissions, methods=["POST"]), gate)
    app.add_route("/tasks/batch", submissions.submit_batch, ["POST"], include_in_schema=False)
    add_task_routes(app, db, waker)
    add_health_routes(app, db, broker_state)
    add_docs_routes(app)
    install_problems(app)
    app.add_middleware(Guard, gate=gate)
    return app


class _Api(FastAPI):
    """
    FastAPI, with a short way around it for what is asked most.
    """

    def __init__(self, **extra: Any) -> None:
        super().__init__(**extra)
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
        direct = self._direct.get((scope.get("method", ""), scope.get("path", "")))
        await (direct or super().__call__)(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = describe(self)
        return self.openapi_schema


def _operation_id(route: APIRoute) -> str:
    return route.name
