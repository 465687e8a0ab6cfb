"""
uvicorn's HTTP protocol with what it lacks: limits, one reading of every request, and problem
documents.

**Limits**: how long the head of a request may take to arrive, how large it may be, and how long a
client may leave its answers unread. Without them a few hundred sockets that send one header byte
every few seconds block a server indefinitely ("slowloris"), and so do sockets that read nothing; a
client that never ends its headers fills the server's memory. Bodies have their limits in `limits`.
Idle connections end by uvicorn's own `timeout_keep_alive`, as long as they send nothing at all.

**One reading**: every request gets one answer, in its turn, and no byte of a body is ever read as
a request, nor the reverse.

- To the parser an offer to upgrade (or CONNECT) is the end of HTTP: it skips the body and reads
  what follows as the next request. Here an offer is ignored, as RFC 9110 7.8 allows: its head is
  read a second time, without the offer.
- uvicorn answers a request that it cannot read immediately, before those that were sent earlier.
  Here it is answered in its turn, and nothing is read after it.
- uvicorn goes on reading after a final answer to `Expect: 100-continue`, when it is unknown
  whether the body will come. Here the connection ends.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast
from urllib.parse import unquote

import httptools
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from asyncflow.api.front.answers import HEADERS
from asyncflow.api.front.head import (
    TARGET_BYTES_MAX,
    check_head,
    head_bytes,
    head_without_offer,
    malformed,
    unknown_version,
)
from asyncflow.api.front.writes import JoinedWrites
from asyncflow.api.problems import problem
from asyncflow.errors import Refusal

# The parser has no codes for its errors.
_VERSION_ERRORS = ("Invalid HTTP version", "Pause on PRI/Upgrade")


class BoundedProtocol(HttpToolsProtocol):
    """
    Refuses heads that are too slow (408), too large (414, 431) or ambiguous (400, 501, 505), and
    closes connections whose client does not read.

    Attributes:
        head_seconds_max: From the connection or the head's first byte to its last.
        head_bytes_max: Of a whole head. One without end may exceed it by one read of the socket.
        unread_seconds_max: How long answers may wait for the client to read those before.
    """

    head_seconds_max = 10.0
    head_bytes_max = 64 * 1024
    unread_seconds_max = 30.0

    url = b""
    _head_expected = True
    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    """How much of a head came with the reads after the one in which it began."""
    _read_bytes = 0
    _reads_no_more = False
    _unread_timer: asyncio.TimerHandle | None = None
    _writes: JoinedWrites

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """
        Limit the time to the first head, too: a connection may never send anything.
        """
        self._writes = JoinedWrites(
            transport, self.loop, unread_seconds_max=self.unread_seconds_max
        )
        super().connection_made(cast(asyncio.Transport, self._writes))
        self._limit_head()

    def data_received(self, data: bytes) -> None:
        """
        Count bytes and seconds while a head is incomplete; most arrive whole.
        """
        if self._reads_no_more:
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._read_bytes = len(data)
        try:
            at = self._feed(data)
            if at is not None:
                self._read_without_offers(memoryview(data), at)
        except Refusal as refusal:
            return self._refuse(refusal)
        if self._head_expected:
            self._limit_head()
            self._head_bytes += len(data)
            if self._head_bytes > self.head_bytes_max:
                self._refuse(self._too_large())
        elif self.cycle is not None and self.cycle.response_complete:
            # Line breaks between two requests, or the rest of a body that was refused unread.
            # uvicorn takes them for the next request and stops its own timer.
            self._limit_head()

    def _read_without_offers(self, data: memoryview, at: int | None) -> None:
        # To the parser, a head that offers an upgrade is the last one, and `data` from `at` on is
        # another protocol. A new parser reads both as HTTP.
        while at is not None:
            head = head_without_offer(
                self.parser.get_method(), self.url, self.parser.get_http_version(), self.headers
            )
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            self._feed(head)
            data = data[at:]
            at = self._feed(data)

    def _feed(self, data: bytes | memoryview) -> int | None:
        """
        Parse, and return where a head with an offer to upgrade ended; None if there was none.
        """
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            return int(offer.args[0])
        except httptools.HttpParserError as error:
            raise _refusal_for(error) from None
        return None

    def _should_upgrade(self) -> bool:
        # uvicorn asks after an offer, and then starts no request. See `_read_without_offers`.
        return True

    def on_message_begin(self) -> None:
        """
        The first byte of a head.
        """
        super().on_message_begin()
        self._head_ended()
        self._head_expected = True
        self._head_bytes = -self._read_bytes

    def on_url(self, url: bytes) -> None:
        """
        A piece of the target.
        """
        self.url += url
        if len(self.url) > TARGET_BYTES_MAX:
            raise Refusal(
                "target-too-long",
                f"Path and query are too long; at most {TARGET_BYTES_MAX} bytes are accepted.",
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        """
        One header. Those behind a chunked body are not part of the head: a proxy before us has
        not seen them.
        """
        name = name.lower()
        if not self._head_expected:
            # The parser alone would obey it, and read nothing more.
            if name in (b"connection", b"proxy-connection"):
                raise malformed("a Connection header follows the body")
            return
        value = value.rstrip()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """
        The last byte of a head.
        """
        read = self._read_bytes
        if self._head_bytes != -read or read > self.head_bytes_max:
            # It came in several pieces or in a large one, so it may be too large.
            if head_bytes(self.url, self.headers) > self.head_bytes_max:
                raise self._too_large()
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise Refusal(
                    "not-implemented", "This server is not a proxy: it does not support CONNECT."
                )
            return
        version = self.parser.get_http_version()
        self.url = check_head(self.url, version, self.headers)
        self._head_ended()
        self._begin(version)

    def _begin(self, version: str) -> None:
        # What uvicorn does after a head, without the parts that AsyncFlow does not use.
        scope = self.scope
        scope["method"] = self.parser.get_method().decode("ascii")
        if version != "1.1":
            scope["http_version"] = version
            self.expect_100_continue = False  # HTTP/1.0 has no interim answers.
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        keeps_alive = version == "1.1" and self.parser.should_keep_alive()
        earlier, self.cycle = self.cycle, self._cycle(scope, keeps_alive=keeps_alive)
        app = self.app
        if self.expect_100_continue:
            app = self._ending_if_unasked(self.cycle, app)
        if earlier is None or earlier.response_complete:
            self._start_asgi_task(self.cycle, app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, app))

    def _cycle(self, scope: Any, *, keeps_alive: bool) -> RequestResponseCycle:
        return RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keeps_alive,
            on_response=self.on_response_complete,
        )

    def _ending_if_unasked(self, cycle: RequestResponseCycle, app: Any) -> Any:
        # A client that is answered before it was asked for its body may send it or not. What comes
        # next is ambiguous, so the connection ends.
        async def asking(scope: Scope, receive: Receive, send: Send) -> None:
            async def sending(message: Message) -> None:
                if cycle.waiting_for_100_continue and cycle.more_body:
                    cycle.keep_alive = False
                    self._writes.lingers = True
                await send(message)

            await app(scope, receive, sending)

        return asking

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """
        The client sends no more; its complete requests are still answered.
        """
        self._writes.lingers = False
        if self.cycle is None or self.cycle.response_complete or self.cycle.more_body:
            # Closing is not left to the event loop, which does not know what is still unwritten.
            self.transport.close()
            return None
        self._head_ended()
        self._reads_no_more = True
        self.cycle.keep_alive = False
        return True

    def pause_writing(self) -> None:
        """
        The client reads more slowly than we answer.
        """
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self.unread_seconds_max, self.transport.abort)

    def resume_writing(self) -> None:
        """
        The client has read most of it.
        """
        self._stop_unread_timer()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """
        Stop the timers.
        """
        self._head_ended()
        self._stop_unread_timer()
        super().connection_lost(exc)

    def _limit_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds_max, self._head_is_late)

    def _head_is_late(self) -> None:
        if self._head_expected:
            seconds = f"{self.head_seconds_max:g}"
            self._refuse(
                Refusal("request-timeout", f"The head did not arrive within {seconds} seconds.")
            )
        else:
            self._head_ended()
            self.transport.close()

    def _head_ended(self) -> None:
        self._head_expected = False
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _too_large(self) -> Refusal:
        return Refusal(
            "head-too-large",
            f"The headers are too large; at most {self.head_bytes_max} bytes are accepted.",
        )

    def _refuse(self, refusal: Refusal) -> None:
        """
        Answer the request that is being read with a problem, in its turn, and read no more.
        """
        is_in_head = self._head_expected
        self._head_ended()
        self._reads_no_more = True
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        self._writes.lingers = True
        earlier = self.cycle is not None and not self.cycle.response_complete
        if not is_in_head:
            if self.cycle.response_started:
                # It has its answer; a second one would be read as the answer to the next request.
                self.cycle.keep_alive = False
                if self.cycle.response_complete:
                    self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            earlier = bool(self.pipeline) and self.pipeline[0][0] is self.cycle
            if earlier:
                self.pipeline.popleft()
        method = self.parser.get_method().decode() if self.url else "GET"
        self.expect_100_continue = False
        self.cycle = self._cycle({"type": "http", "method": method}, keeps_alive=False)
        self.cycle.more_body = False
        if earlier:
            self.pipeline.appendleft((self.cycle, self._answer(refusal)))
        else:
            self._start_asgi_task(self.cycle, self._answer(refusal))

    @staticmethod
    def _answer(refusal: Refusal) -> Any:
        # The path of a request that cannot be read may be incomplete.
        answer = problem(refusal.problem_type, str(refusal), None, headers=refusal.headers)
        answer.raw_headers += HEADERS
        return answer


def _refusal_for(error: httptools.HttpParserError) -> Refusal:
    # The parser raises its own error, with that of our callback as its context.
    if isinstance(error.__context__, Refusal):
        return error.__context__
    reason = str(error)
    if reason in _VERSION_ERRORS:
        return unknown_version()
    if isinstance(error, httptools.HttpParserCallbackError):
        reason = "its target cannot be read"
    return malformed(reason[:1].lower() + reason[1:])
