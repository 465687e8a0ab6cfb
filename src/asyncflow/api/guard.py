"""
The outermost layer of the API: what holds for every response, and the last resort.

It answers HEAD wherever GET is answered, asks `gate` whether a request may go on, adds the
headers that keep browsers from guessing and caching, and turns a fault of ours into a 500 that
tells nothing but an incident id.
"""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asyncflow.api.gate import Gate
from asyncflow.api.problems import answer_error, internal_problem, new_incident_id
from asyncflow.errors import Refusal
from asyncflow.telemetry import events

HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Guard:
    """
    Wraps `app` as described above.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Serve one request.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def guarded_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        # The server drops the body of an answer to HEAD by itself.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            self._gate.check(scope)
            await self._app(asked, receive, guarded_send)
        except Refusal as refusal:
            # The gate's: what is refused further in is answered there.
            response = await answer_error(Request(scope), refusal)
            await response(scope, receive, guarded_send)
        except ClientDisconnect:
            # Nobody is left to answer, and nothing was begun.
            pass
        except Exception as error:
            incident_id = new_incident_id()
            events.request_failed(
                incident_id=incident_id, method=scope["method"], path=scope["path"], error=error
            )
            if started:
                # Half an answer is out: breaking the connection is the only way to say so.
                raise
            await internal_problem(scope["path"], incident_id)(scope, receive, guarded_send)
