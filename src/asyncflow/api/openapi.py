"""
The OpenAPI description: what FastAPI derives, and what it cannot know.

It cannot know the plain endpoint of `POST /tasks`, what operations read from their bodies by
themselves, nor that errors are problem documents.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from asyncflow.api.examples import EXAMPLES
from asyncflow.api.problems import KINDS, MEDIA_TYPE
from asyncflow.wire.batches import SubmitBatch
from asyncflow.wire.problems import Problem
from asyncflow.wire.submissions import SubmitTask, SubmittedTask

DESCRIPTION = """
Submit a task and get `202 Accepted` once it is committed to PostgreSQL: from then on it survives
any crash. A worker runs the handler registered under the task's name; `GET /tasks/{id}` returns
its status and, once completed, its result. Errors are problem documents (RFC 9457) that say what
would be accepted.

`Idempotency-Key` is not supported yet: a request that would change something and has this header
is refused with 501, so that no client relies on it.
"""

TAGS = [
    {"name": "tasks", "description": "Submit, watch and steer tasks."},
    {"name": "health", "description": "Probes for orchestrators and load balancers."},
]

_REFERENCE = "#/components/schemas/{model}"

CHANGE_PROBLEMS = ("cross-site", "idempotency-key-unsupported")
"""Possible answers of every operation that changes something."""

SUBMISSION_PROBLEMS = (
    "malformed-json",
    "request-timeout",
    "body-too-large",
    "unsupported-media-type",
    "invalid-task",
    "invalid-payload",
    "unavailable",
    *CHANGE_PROBLEMS,
)
"""Possible answers of the operations that submit tasks."""


def problems(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """
    The responses for problems of these `kinds`, and for those that every operation may answer.
    """
    titles: dict[int, list[str]] = {}
    for kind in (*kinds, "misdirected", "internal"):
        titles.setdefault(KINDS[kind].status, []).append(KINDS[kind].title)
    return {
        status: _problem_response(" or ".join([texts[0], *map(_lowered, texts[1:])]))
        for status, texts in sorted(titles.items())
    }


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """
    The description of an operation that reads a `model` from its body by itself.
    """
    content = {"application/json": {"schema": _reference(model)}}
    return {"requestBody": {"required": True, "content": content}}


def operation_id(route: APIRoute) -> str:
    """
    The name of the function that serves it: client generators name their methods by it.
    """
    return route.name


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
    document["paths"] = {"/tasks": {"post": _SUBMIT, **paths.pop("/tasks")}, **paths}
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


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _problem_response(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {MEDIA_TYPE: {"schema": _reference(Problem)}},
    }


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


_SUBMIT = {
    "tags": ["tasks"],
    "summary": "Submit a task",
    "description": "Answers once the task is committed. A name that no worker offers yet is "
    "accepted, too: the task waits for a worker that offers it.",
    "operationId": "submit_task",
    **takes(SubmitTask),
    "responses": {
        "202": {
            "description": "Stored.",
            "headers": {
                "Location": {"description": "The task's path.", "schema": {"type": "string"}}
            },
            "content": {"application/json": {"schema": _reference(SubmittedTask)}},
        },
        **{str(status): told for status, told in problems(*SUBMISSION_PROBLEMS).items()},
    },
}
"""FastAPI does not know the plain endpoint of `POST /tasks`."""
