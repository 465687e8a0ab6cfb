"""
The way every response takes: HEAD is answered wherever GET is, browsers are kept from guessing and
caching, and whatever fails further in becomes a problem document.
"""

from __future__ import annotations

from collections.abc import Mapping
from uuid import uuid4

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncflow.api.field_errors import parameter_errors
from asyncflow.api.front.unrouted import method_not_allowed, not_found
from asyncflow.api.problems import invalid_problem, problem
from asyncflow.errors import (
    AsyncFlowError,
    IllegalTransition,
    InvalidDocument,
    InvalidQuery,
    Refusal,
    StoreUnavailable,
)
from asyncflow.telemetry import events

HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]

RETRY_AFTER_SECONDS = 1


class Answers:
    """
    Answers the errors of `app`, and completes its answers as described above.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Serve one request.
        """
        started = False

        async def completed_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        # The server drops the body of an answer to HEAD by itself.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._app(asked, receive, completed_send)
        except ClientDisconnect:
            # No one is left to answer, and nothing was begun.
            pass
        except Exception as error:
            answer = answer_to(error, scope) or _internal(error, scope)
            if started:
                # Half an answer is out: breaking the connection is the only way to say so.
                raise
            await answer(scope, receive, completed_send)


def answer_to(error: Exception, scope: Scope) -> Response | None:
    """
    The response to an error that a client can do something about; None for any other.
    """
    path = scope["path"]
    match error:
        case HTTPException(status_code=405):
            return method_not_allowed(scope)
        case HTTPException(status_code=404):
            return not_found(scope)
        case RequestValidationError():
            errors, count = parameter_errors(error)
            return invalid_problem(InvalidQuery(errors, count=count), path)
        case InvalidDocument() | InvalidQuery():
            return invalid_problem(error, path)
        case AsyncFlowError(problem_type=str(kind)):
            return problem(kind, _detail(error), path, headers=_headers(error), **_members(error))
        case _:
            return None


def _detail(error: AsyncFlowError) -> str:
    if isinstance(error, StoreUnavailable):
        # PostgreSQL's own words may name hosts and users; they belong in the log.
        return "The database is unavailable; try again."
    return str(error)


def _headers(error: AsyncFlowError) -> Mapping[str, str] | None:
    if isinstance(error, Refusal):
        return error.headers
    return {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.http_status == 503 else None


def _members(error: AsyncFlowError) -> dict[str, str]:
    return {"state": error.state.upper()} if isinstance(error, IllegalTransition) else {}


def _internal(error: Exception, scope: Scope) -> Response:
    incident_id = uuid4().hex[:12]
    path = scope["path"]
    events.request_failed(incident_id=incident_id, method=scope["method"], path=path, error=error)
    detail = f"An internal error occurred; the server log has it as incident {incident_id}."
    return problem("internal", detail, path, incident_id=incident_id)
