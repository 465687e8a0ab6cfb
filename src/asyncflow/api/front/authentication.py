"""
Who sends a request. There is one tenant so far and no credentials, so it is always the same
principal.

Routes read the principal that this step leaves in the scope.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from asyncflow.domain.task import DEFAULT_TENANT_ID

PRINCIPAL = "asyncflow.principal"
"""The key of the `Principal` in a request's scope."""


class Principal(NamedTuple):
    """
    The sender of a request.
    """

    tenant_id: int


EVERYONE = Principal(DEFAULT_TENANT_ID)


class Authentication:
    """
    Tells `app` who sends a request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """
        Serve one request.
        """
        scope[PRINCIPAL] = EVERYONE
        return self._app(scope, receive, send)
