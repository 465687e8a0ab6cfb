"""
Every error as an RFC 9457 problem document, mapped in one place.

`KINDS` lists what can go wrong and is part of the API: a `type` never changes its meaning.
Its URIs are relative, so that they work behind any host name, and can be opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from uuid import uuid4

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from asyncflow.api.field_errors import parameter_errors
from asyncflow.errors import (
    AsyncFlowError,
    IllegalTransition,
    InvalidDocument,
    InvalidPayload,
    InvalidQuery,
    InvalidTask,
    MalformedJson,
    Refusal,
    SchemaMismatch,
    StoreUnavailable,
    TaskNotFound,
)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1
TEXT_LENGTH_MAX = 500
"""Longer pointers and details are cut; both may quote what was sent."""


class Kind(NamedTuple):
    """
    One kind of problem; `meaning` says what happened and what the caller can do.
    """

    status: int
    title: str
    meaning: str


KINDS = {
    "malformed-request": Kind(
        400,
        "Malformed request",
        "The request is not HTTP/1.1, or could be read in more than one way. Nothing was done, and "
        "the connection is closed.",
    ),
    "malformed-json": Kind(
        MalformedJson.http_status,
        "Malformed JSON",
        "The body is not a JSON document in UTF-8. Nothing was stored.",
    ),
    "cross-site": Kind(
        403,
        "Cross-site request",
        "A web page of another site asked for a change. Pages of origins listed in "
        "ASYNCFLOW_API_CORS_ORIGINS may do that; no other does. Nothing was done.",
    ),
    "task-not-found": Kind(
        TaskNotFound.http_status,
        "Task not found",
        "There is no task of this id. It may never have existed, or it finished so long ago "
        "that the retention period has passed.",
    ),
    "not-found": Kind(404, "Not found", "There is nothing at this path; see /docs."),
    "method-not-allowed": Kind(
        405, "Method not allowed", "The path exists; the Allow header lists its methods."
    ),
    "request-timeout": Kind(408, "Request timeout", "The request took too long to arrive."),
    "illegal-transition": Kind(
        IllegalTransition.http_status,
        "Not possible in this state",
        "The task's present state does not allow the request; nothing was changed. The member "
        "`state` names that state.",
    ),
    "body-too-large": Kind(
        413, "Body too large", "The body is larger than the server takes. Nothing was stored."
    ),
    "target-too-long": Kind(
        414, "Target too long", "The path with its query is longer than the server takes."
    ),
    "unsupported-media-type": Kind(
        415,
        "Unsupported media type",
        "Bodies must be uncompressed JSON in UTF-8, sent as application/json.",
    ),
    "misdirected": Kind(
        421,
        "Misdirected request",
        "The Host header does not name this server: neither this machine, nor the address it "
        "listens on, nor a name listed in ASYNCFLOW_API_HOSTS. Nothing was done.",
    ),
    "invalid-task": Kind(
        InvalidTask.http_status,
        "Invalid task",
        "The body is JSON, but not a task or batch that can be stored. The member `errors` "
        "points to each wrong place, or to the first of many. Nothing was stored.",
    ),
    "invalid-payload": Kind(
        InvalidPayload.http_status,
        "Invalid payload",
        "The payload does not fit what the handler of this name says it takes, and nothing else "
        "is wrong with the task or its batch. The member `errors` points to each wrong place, or "
        "to the first of many. Nothing was stored.",
    ),
    "invalid-query": Kind(
        InvalidQuery.http_status,
        "Invalid query",
        "The member `errors` names each wrong query parameter.",
    ),
    "head-too-large": Kind(
        431, "Head too large", "The request's headers are larger than the server takes."
    ),
    "internal": Kind(
        500,
        "Internal error",
        "A fault of ours. The server's log has the details under `incident_id`.",
    ),
    "idempotency-key-unsupported": Kind(
        501,
        "Idempotency-Key not supported",
        "The request has the header Idempotency-Key, which this version does not support: a "
        "repetition would be a second task. Leave the header out. Nothing was done.",
    ),
    "not-implemented": Kind(
        501,
        "Not implemented",
        "The request asks for a part of HTTP that this server does not have: a tunnel (CONNECT), "
        "or a transfer coding other than chunked.",
    ),
    "unavailable": Kind(
        StoreUnavailable.http_status,
        "Unavailable",
        "The database cannot serve now; try again after Retry-After seconds. If the connection "
        "to it broke during a submission, that task may have been stored all the same.",
    ),
    "schema-mismatch": Kind(
        SchemaMismatch.http_status,
        "Wrong database schema",
        "The database's schema does not serve this version: migrate, or deploy a newer version.",
    ),
    "http-version": Kind(
        505, "HTTP version not supported", "The server speaks HTTP/1.1 and HTTP/1.0."
    ),
}


def install_problems(app: FastAPI) -> None:
    """
    Make `app` answer every error it knows with a problem document.
    """
    app.add_exception_handler(AsyncFlowError, answer_error)
    app.add_exception_handler(RequestValidationError, answer_error)
    app.add_exception_handler(HTTPException, answer_error)


class Answering:
    """
    Wraps an endpoint that is served without FastAPI, and answers its errors the same way.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Serve one request.
        """
        try:
            await self._app(scope, receive, send)
        except AsyncFlowError as error:
            response = await answer_error(Request(scope), error)
            await response(scope, receive, send)


async def answer_error(request: Request, error: Exception) -> Response:
    """
    The response that tells the client about `error`; raises it again if it is a fault of ours.
    """
    path = request.scope["path"]
    match error:
        case HTTPException(status_code=405):
            return _method_not_allowed(request)
        case HTTPException(status_code=404):
            return problem("not-found", f"There is nothing at {path}{_hint(request.scope)}", path)
        case RequestValidationError():
            errors, count = parameter_errors(error)
            return _response(invalid_document(InvalidQuery(errors, count=count), path))
        case InvalidDocument() | InvalidQuery():
            return _response(invalid_document(error, path))
        case AsyncFlowError(problem_type=str(kind)):
            return problem(kind, _detail(error), path, headers=_headers(error), **_members(error))
        case _:
            raise error


def _detail(error: AsyncFlowError) -> str:
    if isinstance(error, StoreUnavailable):
        # PostgreSQL's own words may name hosts and users; they belong in the log.
        return "The database cannot serve now; try again."
    return str(error)


def _headers(error: AsyncFlowError) -> Mapping[str, str] | None:
    if isinstance(error, Refusal):
        return error.headers
    return {"Retry-After": str(RETRY_AFTER_SECONDS)} if error.http_status == 503 else None


def _members(error: AsyncFlowError) -> dict[str, str]:
    return {"state": error.state.upper()} if isinstance(error, IllegalTransition) else {}


def internal_problem(path: str, incident_id: str) -> Response:
    """
    The response to a fault of ours; tells nothing but where the log has more.
    """
    detail = f"Something went wrong on our side; the log has it as incident {incident_id}."
    return problem("internal", detail, path, incident_id=incident_id)


def new_incident_id() -> str:
    """
    A name for one fault, to find it in the log.
    """
    return uuid4().hex[:12]


def problem(
    kind: str,
    detail: str,
    path: str | None,
    *,
    headers: Mapping[str, str] | None = None,
    **members: str,
) -> Response:
    """
    A problem document of one of `KINDS` about a request for `path`, None if it is unknown.
    """
    return _response(_document(kind, detail, path, (), **members), headers)


def invalid_document(error: InvalidDocument | InvalidQuery, path: str) -> dict[str, Any]:
    """
    The problem document that points to the wrong places of a request for `path`.
    """
    if isinstance(error, InvalidQuery):
        entries = [{"parameter": name, "detail": text} for name, text in error.errors]
    else:
        entries = [{"pointer": e.pointer, "detail": e.detail} for e in error.errors]
    place = entries[0].get("parameter") or entries[0].get("pointer") or "The body"
    detail = _cut(f"{place} {entries[0]['detail']}.")
    if error.count > len(entries):
        listed = f"the first {len(entries)} are in" if len(entries) > 1 else "this one is in"
        detail += f" (One of {error.count} faults; {listed} `errors`.)"
    elif len(entries) > 1:
        detail += f" (One of {error.count} faults; see `errors`.)"
    return _document(error.problem_type, detail, path, entries)


def _document(
    kind: str,
    detail: str,
    path: str | None,
    errors: Iterable[Mapping[str, str]],
    **members: str,
) -> dict[str, Any]:
    status, title, _ = KINDS[kind]
    document: dict[str, Any] = {
        "type": f"/problems/{kind}",
        "title": title,
        "status": status,
        "detail": detail,
    }
    if path is not None:
        document["instance"] = path
    if clipped := [_clipped(entry) for entry in errors]:
        document["errors"] = clipped
    document.update(members)
    return document


def _response(document: dict[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(as_json(document), document["status"], headers, MEDIA_TYPE)


def as_json(document: Any) -> bytes:
    """
    JSON in UTF-8; half a surrogate pair, which a pointer may quote, becomes "?".
    """
    return json.dumps(document, ensure_ascii=False).encode(errors="replace")


def _clipped(entry: Mapping[str, str]) -> dict[str, str]:
    return {name: _cut(text) for name, text in entry.items()}


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH_MAX else text[: TEXT_LENGTH_MAX - 1] + "…"


def _hint(scope: Scope) -> str:
    # Not a redirect: many clients would follow it with a GET, and a submission would be a list.
    root_path = scope.get("root_path", "")
    path = "/".join(["", *filter(None, _route_path(scope).lower().split("/"))])
    other = {**scope, "path": root_path + path}
    found = path != "/" and any(r.matches(other)[0] is not Match.NONE for r in scope["app"].routes)
    return f"; did you mean {root_path}{path}?" if found else "."


def _route_path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _method_not_allowed(request: Request) -> Response:
    allow = ", ".join(sorted(_allowed_methods(request.scope)))
    if request.method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": allow})
    path = request.scope["path"]
    detail = f"{path} does not take {request.method}; it takes {allow}."
    return problem("method-not-allowed", detail, path, headers={"Allow": allow})


def _allowed_methods(scope: Scope) -> set[str]:
    # Starlette's own answer names the first matching route only. A path of its own, such as
    # /tasks/batch, is not also an id.
    matching = [r for r in scope["app"].routes if r.matches(scope)[0] is not Match.NONE]
    exact = [route for route in matching if route.path == _route_path(scope)]
    methods = {"OPTIONS"}.union(*(route.methods for route in exact or matching))
    return methods | {"HEAD"} if "GET" in methods else methods
