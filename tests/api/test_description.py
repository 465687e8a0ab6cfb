"""
The OpenAPI description and the docs page are complete, true, and part of the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from asyncflow.api.examples import EXAMPLES
from asyncflow.api.problems import KINDS
from asyncflow.wire import batches, health, problems, submissions, tasks

NOT_DESCRIBED = {
    "/",
    "/docs",
    "/docs/page.js",
    "/docs/page.css",
    "/openapi.json",
    "/problems/{kind}",
}


@pytest.fixture
async def description(offline_client: httpx.AsyncClient) -> dict[str, Any]:
    """
    The parsed /openapi.json.
    """
    answer = await offline_client.get("/openapi.json")
    document: dict[str, Any] = answer.json()
    return document


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from nodes(item)
    elif isinstance(value, list):
        for item in value:
            yield from nodes(item)


def operations(description: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def model(name: str) -> type[BaseModel]:
    modules = (submissions, batches, tasks, problems, health)
    found: dict[str, type[BaseModel]] = {
        k: v for module in modules for k, v in vars(module).items()
    }
    return found[name]


async def test_every_route_is_described(app: FastAPI, description: dict[str, Any]) -> None:
    """
    Every route is described, including the one that bypasses FastAPI.
    """
    served = {
        (method, route.path)  # type: ignore[attr-defined]
        for route in app.routes
        if route.path not in NOT_DESCRIBED  # type: ignore[attr-defined]
        for method in route.methods - {"HEAD"}  # type: ignore[attr-defined]
    }

    assert served == {(method.upper(), path) for method, path, _ in operations(description)}
    assert 9 == len(served)


async def test_every_reference_resolves_and_every_shape_is_used(
    description: dict[str, Any],
) -> None:
    """
    There is no dangling `$ref`, no unused schema, and no trace of FastAPI's own errors.
    """
    schemas = description["components"]["schemas"]
    used = {node["$ref"] for node in nodes(description) if "$ref" in node}

    assert used == {f"#/components/schemas/{name}" for name in schemas}


async def test_every_operation_tells_its_errors(description: dict[str, Any]) -> None:
    """
    Errors are problem documents with descriptions, and operation ids are unique.
    """
    ids = [operation["operationId"] for _, _, operation in operations(description)]
    assert len(set(ids)) == len(ids)
    for _, path, operation in operations(description):
        assert operation["summary"] and operation["description"] and operation["tags"]
        for status, answer in operation["responses"].items():
            assert answer["description"]
            kind = "application/json" if status < "400" else "application/problem+json"
            assert list(answer["content"]) == [kind]
        if path != "/health/live":
            assert {"500", "503"} <= set(operation["responses"])


async def test_every_shape_and_example_is_good_json_schema(description: dict[str, Any]) -> None:
    """
    The schemas compile, and the examples validate against them.
    """
    schemas = description["components"]["schemas"]
    for name, schema in schemas.items():
        whole = {**schema, "components": {"schemas": schemas}}
        jsonschema_rs.meta.validate(whole)
        validator = jsonschema_rs.validator_for(whole, validate_formats=True)
        for example in schema.get("examples", []):
            validator.validate(example)
            model(name).model_validate(example)
    assert set(EXAMPLES) <= set(schemas)


async def test_real_answers_fit_their_description(
    client: httpx.AsyncClient, description: dict[str, Any]
) -> None:
    """
    The API's answers match its description.
    """
    submitted = await client.post("/tasks", json={"name": "x"})
    path = submitted.headers["location"]
    later = (await client.post("/tasks", json={"name": "x", "delay_seconds": 60})).headers[
        "location"
    ]
    answers = {
        ("/tasks", "post"): submitted,
        ("/tasks/batch", "post"): await client.post(
            "/tasks/batch", json={"tasks": [{"name": "y", "delay_seconds": 5}]}
        ),
        ("/tasks", "get"): await client.get("/tasks", params={"limit": 1}),
        ("/tasks/{id}", "get"): await client.get(path),
        ("/tasks/{id}/cancel", "post"): await client.post(f"{path}/cancel"),
        ("/tasks/{id}/run-now", "post"): await client.post(f"{later}/run-now"),
        ("/tasks/{id}/redrive", "post"): await client.post(f"{path}/redrive"),
        ("/health/live", "get"): await client.get("/health/live"),
        ("/health/ready", "get"): await client.get("/health/ready"),
    }

    assert set(answers) == {(path, method) for method, path, _ in operations(description)}
    for (path, method), answer in answers.items():
        told = description["paths"][path][method]["responses"][str(answer.status_code)]
        schema = told["content"]["application/json"]["schema"]
        whole = {**schema, "components": description["components"]}
        jsonschema_rs.validator_for(whole, validate_formats=True).validate(answer.json())


async def test_the_limits_are_part_of_the_description(description: dict[str, Any]) -> None:
    """
    The limits are in the schemas, so a generated client can check them before it sends a request.
    """
    fields = description["components"]["schemas"]["SubmitTask"]["properties"]

    assert (0, 9) == (fields["priority"]["minimum"], fields["priority"]["maximum"])
    assert "^[A-Za-z0-9._-]{1,128}$" == fields["name"]["pattern"]
    batch = description["components"]["schemas"]["SubmitBatch"]["properties"]["tasks"]
    assert 1000 == batch["maxItems"]
    assert set(description["x-problems"]) == set(KINDS)


async def test_the_docs_page_needs_nothing_from_elsewhere(
    offline_client: httpx.AsyncClient,
) -> None:
    """
    The page works offline, and its Content-Security-Policy would block anything foreign.
    """
    front = await offline_client.get("/")
    page = await offline_client.get("/docs")

    assert (307, "/docs") == (front.status_code, front.headers["location"])
    assert 200 == page.status_code
    assert "text/html; charset=utf-8" == page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    own = [link for link in linked if not link.startswith("data:")]
    assert 3 == len(own)
    for link in own:
        assert "//" not in link
        asset = await offline_client.get(f"/{link}")
        assert 200 == asset.status_code
        assert "http" not in asset.text.replace("http://www.w3.org", "") or link == "openapi.json"
