"""
The CORS headers for pages of other origins.
"""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest
from fastapi import FastAPI

from asyncflow.api.front.cors import with_cors
from asyncflow.settings import Settings

PAGE = "https://app.example.com"
FOREIGN = "https://evil.example"
NOBODY = "00000000-0000-7000-8000-000000000000"
ROUTES = [
    ("GET", "/tasks", 200),
    ("POST", "/tasks", 202),
    ("POST", "/tasks/batch", 422),
    ("GET", f"/tasks/{NOBODY}", 404),
    ("POST", f"/tasks/{NOBODY}/cancel", 404),
    ("POST", f"/tasks/{NOBODY}/redrive", 404),
    ("GET", "/health/ready", 200),
    ("GET", "/openapi.json", 200),
    ("GET", "/nothing", 404),
    ("PUT", "/tasks", 405),
]


@pytest.fixture
def origins() -> tuple[str, ...]:
    """
    Two allowed origins, unless a test overrides them.
    """
    return (PAGE, "http://localhost:5173")


@pytest.fixture
def settings(settings: Settings, origins: tuple[str, ...]) -> Settings:
    """
    Settings that allow `origins`.
    """
    return replace(settings, api_cors_origins=origins)


@pytest.fixture
def browser(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """
    A client that sends the headers of a browser.
    """
    return client


async def asked(
    browser: httpx.AsyncClient, method: str, path: str, origin: str | None
) -> httpx.Response:
    """
    The answer to a page of `origin`, or to a client that is not a page if None.
    """
    headers = {"Origin": origin} if origin else {}
    return await browser.request(method, path, json={"name": "x"}, headers=headers)


def told(answer: httpx.Response) -> dict[str, str]:
    """
    The CORS headers and `Vary`.
    """
    return {
        name.removeprefix("access-control-"): value
        for name, value in answer.headers.items()
        if name.startswith("access-control-") or name == "vary"
    }


@pytest.mark.parametrize(("method", "path", "status"), ROUTES)
async def test_a_page_of_an_allowed_origin_may_read_every_answer(
    browser: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    """
    The page can also read problems, and the `Location` of a task that it submitted.
    """
    answer = await asked(browser, method, path, PAGE)

    assert status == answer.status_code
    assert told(answer) == {
        "allow-origin": PAGE,
        "expose-headers": "allow, location, retry-after",
        "vary": "Origin",
    }


@pytest.mark.parametrize("origin", [FOREIGN, "null", f"{PAGE}.evil.example", f"{PAGE}:8443", None])
async def test_other_origins_get_no_header_but_vary(
    browser: httpx.AsyncClient, origin: str | None
) -> None:
    """
    Other origins get no CORS headers; `Vary` keeps a cache from giving them another page's answer.
    """
    answers = [await asked(browser, "GET", path, origin) for path in ("/tasks", "/nothing")]

    assert [{"vary": "Origin"}] * 2 == [told(answer) for answer in answers]


@pytest.mark.parametrize(("method", "path", "status"), ROUTES[:-2])
async def test_a_browser_that_asks_beforehand_is_told_what_it_may_send(
    browser: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    """
    A preflight is answered on every path, and allows every header that the page asks for.
    """
    answer = await browser.options(
        path,
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": method,
            "Access-Control-Request-Headers": "content-type,traceparent",
        },
    )

    assert 204 == answer.status_code
    assert method in answer.headers["allow"]
    assert told(answer) == {
        "allow-origin": PAGE,
        "allow-methods": "GET, HEAD, POST",
        "allow-headers": "content-type,traceparent",
        "max-age": "600",
        "expose-headers": "allow, location, retry-after",
        "vary": "Origin, Access-Control-Request-Headers",
    }


async def test_a_browser_that_asks_for_a_foreign_page_is_told_nothing(
    browser: httpx.AsyncClient,
) -> None:
    """
    A preflight from another origin gets no CORS headers, so the browser does not send the request.
    """
    headers = {"Origin": FOREIGN, "Access-Control-Request-Method": "POST"}
    answer = await browser.options("/tasks", headers=headers)

    assert {"vary": "Origin"} == told(answer)


@pytest.mark.parametrize("origins", [("*",)])
async def test_an_asterisk_allows_every_origin(browser: httpx.AsyncClient) -> None:
    """
    With `*`, answers do not differ by origin, so they need no `Vary`.
    """
    answer = await asked(browser, "GET", "/tasks", FOREIGN)

    assert {"allow-origin": "*", "expose-headers": "allow, location, retry-after"} == told(answer)


async def test_without_origins_nothing_is_added_or_run(app: FastAPI) -> None:
    """
    Without origins the CORS middleware is not installed, so it costs a submission nothing.
    """
    assert app is with_cors(app, origins=())
