"""
The page at /docs: `openapi.json` for people, in one HTML file, one script and one style sheet.

They are part of the package, so that the page works offline and under a strict
Content-Security-Policy. `/problems/{kind}` explains the kinds of problems. Why this is not Redoc
or Scalar: see docs/internals/decisions.md.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from asyncflow.api.problems import KINDS
from asyncflow.errors import Refusal

SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

ASSETS = {
    "/docs": ("page.html", "text/html"),
    "/docs/page.js": ("page.js", "text/javascript"),
    "/docs/page.css": ("page.css", "text/css"),
}


async def go_to_docs(request: Request) -> Response:
    """
    Send people who open the server's address to the docs page.
    """
    return RedirectResponse(f"{request.scope.get('root_path', '')}/docs", 307)


async def explain_problem(request: Request) -> Response:
    """
    What the `type` of a problem document means.
    """
    kind = KINDS.get(request.path_params["kind"])
    if kind is None:
        raise Refusal("not-found", f"No problem of this kind; the kinds are {_kinds()}.")
    return PlainTextResponse(f"{kind.title} (HTTP {kind.status})\n\n{kind.meaning}\n")


def _kinds() -> str:
    return ", ".join(KINDS)


def _asset(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = files(__name__).joinpath(name).read_text(encoding="utf-8")

    async def asset(request: Request) -> Response:
        return Response(
            content, media_type=media_type, headers={"Content-Security-Policy": SECURITY_POLICY}
        )

    return asset


router = APIRouter(include_in_schema=False)
router.add_route("/", go_to_docs)
router.add_route("/problems/{kind}", explain_problem)
for _path, (_name, _media_type) in ASSETS.items():
    router.add_route(_path, _asset(_name, _media_type))
