"""
The kinds of problems, and RFC 9457 documents of them.

`KINDS` is part of the API: a `type` never changes its meaning. Its URIs are relative, so that they
work behind any host name, and can be opened. Which error becomes which problem is in
`front.answers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from starlette.responses import Response

from asyncflow.errors import (
    IllegalTransition,
    InvalidDocument,
    InvalidPayload,
    InvalidQuery,
    InvalidTask,
    MalformedJson,
    SchemaMismatch,
    StoreUnavailable,
    TaskNotFound,
)

MEDIA_TYPE = "application/problem+json"
TEXT_LENGTH_MAX = 500
"""Longer pointers and details are shortened; both may quote the request."""


class Kind(NamedTuple):
    """
    One kind of problem; `meaning` says what happened and what the client can do.
    """

    status: int
    title: str
    meaning: str


KINDS = {
    "malformed-request": Kind(
        400,
        "Malformed request",
        "The request is not valid HTTP/1.1, or could be read in more than one way. Nothing was "
        "done, and the connection is closed.",
    ),
    "malformed-json": Kind(
        MalformedJson.http_status,
        "Malformed JSON",
        "The body is not a JSON document in UTF-8. Nothing was stored.",
    ),
    "cross-site": Kind(
        403,
        "Cross-site request",
        "A web page of another site requested a change. Only pages of origins listed in "
        "ASYNCFLOW_API_CORS_ORIGINS may do that. Nothing was done.",
    ),
    "task-not-found": Kind(
        TaskNotFound.http_status,
        "Task not found",
        "No task with this id. It may never have existed, or it was deleted when its retention "
        "period ended.",
    ),
    "not-found": Kind(404, "Not found", "There is nothing at this path; see /docs."),
    "method-not-allowed": Kind(
        405, "Method not allowed", "The path exists; the Allow header lists its methods."
    ),
    "request-timeout": Kind(408, "Request timeout", "The request took too long to arrive."),
    "illegal-transition": Kind(
        IllegalTransition.http_status,
        "Not possible in this state",
        "The task's current state does not allow the request; nothing was changed. `state` is "
        "that state.",
    ),
    "body-too-large": Kind(
        413, "Body too large", "The body is larger than the server accepts. Nothing was stored."
    ),
    "target-too-long": Kind(
        414, "Target too long", "The path and query are longer than the server accepts."
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
        "The body is JSON, but not a task or batch that can be stored. `errors` points to each "
        "error, or to the first of many. Nothing was stored.",
    ),
    "invalid-payload": Kind(
        InvalidPayload.http_status,
        "Invalid payload",
        "The payload does not fit the schema of the handler with this name; nothing else is wrong "
        "with the task or its batch. `errors` points to each error, or to the first of many. "
        "Nothing was stored.",
    ),
    "invalid-query": Kind(
        InvalidQuery.http_status,
        "Invalid query",
        "`errors` names each invalid query parameter.",
    ),
    "head-too-large": Kind(
        431, "Head too large", "The request's headers are larger than the server accepts."
    ),
    "internal": Kind(
        500,
        "Internal error",
        "An error in the server. Its log has the details under `incident_id`.",
    ),
    "idempotency-key-unsupported": Kind(
        501,
        "Idempotency-Key not supported",
        "The request has the header Idempotency-Key, which this version does not support: a "
        "repeated request would submit a second task. Remove the header. Nothing was done.",
    ),
    "not-implemented": Kind(
        501,
        "Not implemented",
        "The request uses a part of HTTP that this server does not support: a tunnel (CONNECT) or "
        "a transfer coding other than chunked.",
    ),
    "unavailable": Kind(
        StoreUnavailable.http_status,
        "Unavailable",
        "The database is unavailable; try again after Retry-After seconds. If the connection to "
        "it broke during a submission, that task may have been stored nevertheless.",
    ),
    "schema-mismatch": Kind(
        SchemaMismatch.http_status,
        "Wrong database schema",
        "The database schema does not fit this version: migrate it, or deploy a newer version.",
    ),
    "http-version": Kind(
        505, "HTTP version not supported", "The server supports HTTP/1.1 and HTTP/1.0."
    ),
}


def problem(
    kind: str,
    detail: str,
    path: str | None,
    *,
    headers: Mapping[str, str] | None = None,
    **members: str,
) -> Response:
    """
    The response with a problem of one of `KINDS`.

    Args:
        path: The request's; None if it could not be read.
        members: Further members of the document.
    """
    return _response(_document(kind, detail, path, (), **members), headers)


def invalid_problem(error: InvalidDocument | InvalidQuery, path: str) -> Response:
    """
    The response that points to the errors of a request for `path`.
    """
    return _response(invalid_document(error, path))


def invalid_document(error: InvalidDocument | InvalidQuery, path: str) -> dict[str, Any]:
    """
    The problem document that points to the errors of a request for `path`.
    """
    if isinstance(error, InvalidQuery):
        entries = [{"parameter": name, "detail": text} for name, text in error.errors]
    else:
        entries = [{"pointer": e.pointer, "detail": e.detail} for e in error.errors]
    place = entries[0].get("parameter") or entries[0].get("pointer") or "The body"
    detail = _cut(f"{place} {entries[0]['detail']}.")
    if error.count > len(entries):
        listed = f"the first {len(entries)} are in" if len(entries) > 1 else "this one is in"
        detail += f" (One of {error.count} errors; {listed} `errors`.)"
    elif len(entries) > 1:
        detail += f" (One of {error.count} errors; see `errors`.)"
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
    JSON in UTF-8; half of a surrogate pair, which a pointer may quote, becomes "?".
    """
    return json.dumps(document, ensure_ascii=False).encode(errors="replace")


def _clipped(entry: Mapping[str, str]) -> dict[str, str]:
    return {name: _cut(text) for name, text in entry.items()}


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH_MAX else text[: TEXT_LENGTH_MAX - 1] + "…"
