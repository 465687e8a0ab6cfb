"""
Behind a proxy that serves the API under a path prefix.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import replace

import httpx
import pytest

from asyncflow.api.app import create_app
from asyncflow.api.catalogue import Catalogue
from asyncflow.errors import InvalidSettings
from asyncflow.settings import Settings
from asyncflow.store.database import Database
from asyncflow.store.wakeups import Waker

ROOT_PATH = "/jobs/v1"


@pytest.fixture(params=["stripping", "leaving"])
async def proxied(
    request: pytest.FixtureRequest, db: Database, settings: Settings, catalogue: Catalogue
) -> AsyncIterator[httpx.AsyncClient]:
    """
    A client of a proxy that strips the prefix, or keeps it.
    """
    waker = Waker(db)
    app = create_app(
        db,
        replace(settings, api_root_path=ROOT_PATH),
        catalogue=catalogue,
        waker=waker,
        version="1.2.3",
    )

    class Proxy(httpx.ASGITransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            path = request.url.raw_path.decode()
            assert path.startswith(ROOT_PATH)
            if takes_off:
                path = path.removeprefix(ROOT_PATH) or "/"
            asked = httpx.Request(
                request.method,
                request.url.copy_with(raw_path=path.encode()),
                headers=request.headers,
                stream=request.stream,
            )
            return await super().handle_async_request(asked)

    takes_off = request.param == "stripping"
    async with httpx.AsyncClient(transport=Proxy(app=app), base_url="http://api") as client:
        yield client
    await waker.close()


async def test_a_client_can_follow_what_it_is_told(proxied: httpx.AsyncClient) -> None:
    """
    The `Location` of a submitted task has the path that the client sees.
    """
    answer = await proxied.post(f"{ROOT_PATH}/tasks", json={"name": "x"})
    location = answer.headers["location"]
    task = await proxied.get(location)

    assert location == f"{ROOT_PATH}/tasks/{answer.json()['id']}"
    assert (200, "x") == (task.status_code, task.json()["name"])


async def test_every_operation_works_under_the_path(proxied: httpx.AsyncClient) -> None:
    """
    Every operation works below the prefix, and a problem names the path that the client requested.
    """
    batch = await proxied.post(f"{ROOT_PATH}/tasks/batch", json={"tasks": [{"name": "x"}]})
    task = f"{ROOT_PATH}/tasks/{batch.json()['tasks'][0]['id']}"
    answers = [
        await proxied.get(f"{ROOT_PATH}/tasks"),
        await proxied.get(task),
        await proxied.post(f"{task}/cancel"),
        await proxied.get(f"{ROOT_PATH}/health/ready"),
        await proxied.get(f"{ROOT_PATH}/problems/internal"),
    ]
    missing = await proxied.get(f"{ROOT_PATH}/tasks/")
    wrong = await proxied.put(f"{ROOT_PATH}/tasks/batch")

    assert {200} == {answer.status_code for answer in answers}
    assert (missing.status_code, missing.json()["instance"]) == (404, f"{ROOT_PATH}/tasks/")
    assert missing.json()["detail"].endswith(f"; did you mean {ROOT_PATH}/tasks?")
    assert (405, "OPTIONS, POST") == (wrong.status_code, wrong.headers["allow"])


@pytest.mark.parametrize("slash", ["", "/"])
async def test_the_docs_page_works_under_the_path(proxied: httpx.AsyncClient, slash: str) -> None:
    """
    The front page redirects to the docs page, and everything that the docs page loads is found.
    """
    front = await proxied.get(f"{ROOT_PATH}{slash}")
    page = await proxied.get(front.headers["location"])
    links = re.findall(r'(?:src|href)="([^":]+)"', page.text)
    loaded = [await proxied.get(str(page.url.join(link))) for link in links]
    description = (await proxied.get(f"{ROOT_PATH}/openapi.json")).json()

    assert (front.status_code, front.headers["location"]) == (307, f"{ROOT_PATH}/docs")
    assert [200] * 3 == [asset.status_code for asset in loaded]
    assert [{"url": ROOT_PATH}] == description["servers"]


@pytest.mark.parametrize("root_path", ["/tasks", "/tasks/v1", "/health", "/openapi.json"])
async def test_a_path_that_is_the_apis_own_is_refused(settings: Settings, root_path: str) -> None:
    """
    A prefix that equals a path of the API is refused: the API could not tell whether the proxy has
    stripped it.
    """
    async with Database("postgresql://nobody@127.0.0.1:1/nothing") as db:
        with pytest.raises(InvalidSettings, match="ASYNCFLOW_API_ROOT_PATH"):
            create_app(
                db,
                replace(settings, api_root_path=root_path),
                catalogue=Catalogue(db),
                waker=Waker(db),
                version="1",
            )
