"""
The OpenAPI description: what FastAPI derives, and what it cannot know.

It cannot know the plain endpoints that read their own bodies, nor that errors are problem
documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from asyncflow.api.examples import EXAMPLES
from asyncflow.api.problems import KINDS, MEDIA_TYPE
from asyncflow.wire.batches import SubmitBatch, SubmittedBatch
from asyncflow.wire.problems import Problem
from asyncflow.wire.submissions import SubmitTask, SubmittedTask

DESCRIPTION = """
Submit a task and get `202 Accepted` once it is committed to PostgreSQL: it survives any
crash from there on. A worker runs the handler of its name; `GET /tasks/{id}` tells how far
it is. Errors are problem documents (RFC 9457) that say what would have worked.

`Idempotency-Key` is not supported yet: a request for a change that has the header is refused
with 501, so that no client relies on it.
"""

TAGS = [
    {"name": "tasks", "description": "Submit, watch and steer tasks."},
    {"name": "health", "description": "Probes for orchestrators and load balancers."},
]

_REFERENCE = "#/components/schemas/{model}"
_SUBMISSION_PROBLEMS = (
    "malformed-json",
    "request-timeout",
    "body-too-large",
    "unsupported-media-type",
    "invalid-task",
    "invalid-payload",
    "unavailable",
)
CHANGE_PROBLEMS = ("cross-site", "idempotency-key-unsupported")
"""What every operation that changes something may answer."""


def problems(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """
    The responses an operation answers problems of these `kinds` with, and those of every one.
    """
    titles: dict[int, list[str]] = {}
    for kind in (*kinds, "misdirected", "internal"):
        titles.setdefault(KINDS[kind].status, []).append(KINDS[kind].title)
    return {
        status: _problem_response(" or ".join(texts).capitalize())
        for status, texts in sorted(titles.items())
    }


def describe(app: FastAPI) -> dict[str, Any]:
    """
    The OpenAPI document of `app`.
    """
    document: dict[str, Any] = get_openapi(
        title=app.title,
        version=app.version,
        description=app.description,
        tags=app.openapi_tags,
        routes=app.routes,
        separate_input_output_schemas=False,
    )
    _, definitions = models_json_schema(
        [
            (SubmitTask, "validation"),
            (SubmitBatch, "validation"),
            (SubmittedTask, "serialization"),
            (SubmittedBatch, "serialization"),
            (Problem, "serialization"),
        ],
        ref_template=_REFERENCE,
    )
    schemas = document["components"]["schemas"]
    schemas.update(definitions["$defs"])
    _forget_default_errors(document)
    for name, example in EXAMPLES.items():
        schemas[name]["examples"] = [example]
    paths = document["paths"]
    document["paths"] = {
        "/tasks": {"post": _SUBMIT, **paths.pop("/tasks")},
        "/tasks/batch": {"post": _SUBMIT_BATCH},
        **paths,
    }
    document["x-problems"] = {kind: told._asdict() for kind, told in KINDS.items()}
    return document


def _forget_default_errors(document: dict[str, Any]) -> None:
    # FastAPI adds a 422 of its own shape to every operation with parameters.
    for name in ("HTTPValidationError", "ValidationError"):
        del document["components"]["schemas"][name]
    for methods in document["paths"].values():
        for operation in methods.values():
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]


def _problem_response(description: str) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model="Problem")}
    return {"description": description, "content": {MEDIA_TYPE: {"schema": schema}}}


def _operation(
    *,
    name: str,
    summary: str,
    description: str,
    takes: str,
    gives: str,
    headers: Mapping[str, Any],
    partly: str | None = None,
) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=gives)}}}
    return {
        "tags": ["tasks"],
        "summary": summary,
        "description": description,
        "operationId": name,
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model=takes)}}},
        },
        "responses": {
            "202": {"description": "Stored.", "headers": dict(headers), "content": content},
            **({"207": {"description": partly, "content": content}} if partly else {}),
            **{
                str(status): told
                for status, told in problems(*_SUBMISSION_PROBLEMS, *CHANGE_PROBLEMS).items()
            },
        },
    }


_SUBMIT = _operation(
    name="submit_task",
    summary="Submit a task",
    description="Answered once the task is committed. A name that no worker offers yet is "
    "taken, too: the task waits until one does.",
    takes="SubmitTask",
    gives="SubmittedTask",
    headers={
        "Location": {"description": "Where to ask for it.", "schema": {"type": "string"}},
    },
)
_SUBMIT_BATCH = _operation(
    name="submit_batch",
    summary="Submit a batch",
    description="Up to 1000 tasks: all of them are stored, or none. With `partial`, those that can "
    "be are stored, and the answer says what is wrong with the others. Answered in their order.",
    partly="Some could not be stored, or none: they are in `refused`.",
    takes="SubmitBatch",
    gives="SubmittedBatch",
    headers={},
)
