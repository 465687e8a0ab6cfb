"""
A corpus of raw requests: odd but valid ones, invalid ones, and ambiguous ones, each with the
expected reaction of the API.

Many carry a canary where only a body can be: a complete request that would cancel a task. It must
never run, whatever precedes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Sent(NamedTuple):
    """
    What a client sends on one connection.

    Attributes:
        what: A unique description.
        bytes: All bytes sent.
        answers: The expected statuses, in order, without interim responses.
        stays: Whether the connection can be used for another request.
        leaves: Whether the client half-closes the connection after sending.
    """

    what: str
    bytes: bytes
    answers: Sequence[int]
    stays: bool = False
    leaves: bool = False


TASK = b'{"name":"x"}'
JSON = b"Content-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LAST = b"0\r\n\r\n"


def get(
    *lines: bytes, target: bytes = b"/health/live", method: bytes = b"GET", body: bytes = b""
) -> bytes:
    """
    A request that reads something, with these additional header lines.
    """
    head = [method + b" " + target + b" HTTP/1.1\r\nHost: api\r\n", *lines, b"\r\n", body]
    return b"".join(head)


def post(*lines: bytes, body: bytes = TASK, target: bytes = b"/tasks") -> bytes:
    """
    A request that submits a task; `lines` must state the length of its body.
    """
    return get(JSON, *lines, target=target, method=b"POST", body=body)


def length(body: bytes) -> bytes:
    """
    The Content-Length header for this body.
    """
    return b"Content-Length: %d\r\n" % len(body)


def chunks(*pieces: bytes) -> bytes:
    """
    A chunked body without its last chunk.
    """
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def cancelling(task_id: str) -> bytes:
    """
    A canary: a request that cancels this task.
    """
    return b"POST /tasks/%b/cancel HTTP/1.1\r\nHost: api\r\n\r\n" % task_id.encode()


def corpus(canary: bytes) -> Iterator[Sent]:
    """
    The whole corpus, with this canary.
    """
    yield from upgrades(canary)
    yield from tunnels(canary)
    yield from expectations(canary)
    yield from lengths(canary)
    yield from two_framings(canary)
    yield from codings(canary)
    yield from chunk_framings(canary)
    yield from trailers(canary)
    yield from header_lines(canary)
    yield from repeated_headers()
    yield from large_heads()
    yield from request_lines(canary)
    yield from targets()
    yield from versions()
    yield from unneeded_bodies(canary)
    yield from pipelines(canary)
    yield from half_closed(canary)


def upgrades(canary: bytes) -> Iterator[Sent]:
    """
    Offers to speak another protocol, which a server may ignore (RFC 9110 7.8).
    """
    for offer, connection in itertools.product(OFFERS, CONNECTIONS):
        lines = [b"Connection: %b\r\n" % connection, b"Upgrade: %b\r\n" % offer]
        stays = b"close" not in connection
        what = f"upgrade {offer.decode()}, {connection.decode()}, "
        yield Sent(what + "a task", post(*lines, length(TASK)), [202], stays)
        yield Sent(what + "a canary", post(*lines, length(canary), body=canary), [400], stays)
    for offer in OFFERS:
        lines = [b"Upgrade: %b\r\n" % offer, b"Connection: Upgrade\r\n"]
        what = f"upgrade {offer.decode()}, "
        body = chunks(TASK[:5], TASK[5:]) + LAST
        yield Sent(what + "in chunks", post(*lines, CHUNKED, body=body), [202], True)
        body = chunks(canary) + LAST
        yield Sent(what + "a canary in chunks", post(CHUNKED, *lines, body=body), [400], True)
        yield Sent(what + "no body", get(*lines), [200], True)
        yield Sent(what + "twice", get(*lines) * 2, [200] * 2, True)
    for what, lines in ODD_OFFERS.items():
        yield Sent(what, post(*lines, length(canary), body=canary), [400], True)
    yield Sent(
        "as curl --http2 does it",
        post(
            b"User-Agent: curl/8.5.0\r\nAccept: */*\r\n",
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n",
            b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n",
            length(TASK),
        ),
        [202],
        True,
    )
    yield Sent(
        "as a browser opens a web socket",
        get(
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        ),
        [200],
        True,
    )
    offered = post(b"Connection: Upgrade\r\nUpgrade: h2c\r\n", length(TASK))
    yield Sent("sixty pipelined offers", offered * 60, [202] * 60, True)
    yield Sent("an offer among others", get() + offered + get(), [200, 202, 200], True)
    old = b"GET /health/live HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    yield Sent("an offer of HTTP/1.0", old, [200])
    wrong = get(b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Content-Length: -1\r\n", body=canary)
    yield Sent("an offer with a wrong length", wrong, [400])


OFFERS = [b"h2c", b"websocket", b"TLS/1.2", b"h2c, TLS/1.2", b"HTTP/2.0", b"foo/1", b"\xc2\xa0"]
CONNECTIONS = [b"Upgrade", b"keep-alive, upgrade", b"Upgrade, HTTP2-Settings", b"Upgrade, close"]
ODD_OFFERS = {
    "no connection option": [b"Upgrade: h2c\r\n"],
    "an option without an offer": [b"Connection: Upgrade\r\n"],
    "an empty offer": [b"Connection: Upgrade\r\nUpgrade:\r\n"],
    "two offers": [b"Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n"],
    "two options": [
        b"Connection: upgrade\r\n" * 2,
        b"Upgrade: a\r\n",
    ],
    "a proxy's option": [b"Proxy-Connection: upgrade\r\nUpgrade: h2c\r\n"],
    "an option in quotes": [b'Connection: "upgrade"\r\nUpgrade: h2c\r\n'],
    "an option among others": [b"Connection: a, upgrade, b\r\nUpgrade: h2c\r\n"],
    "settings alone": [b"HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"],
}


def tunnels(canary: bytes) -> Iterator[Sent]:
    """
    CONNECT, which would also end HTTP on the connection.
    """
    for target in (b"db:5432", b"api:80", b"/tasks", b"http://api/", b"*", b"[::1]:22"):
        for what, lines in {
            "": [],
            " with a length": [length(canary)],
            " with an offer": [b"Connection: Upgrade\r\nUpgrade: h2c\r\n", length(canary)],
        }.items():
            sent = get(*lines, method=b"CONNECT", target=target, body=canary)
            yield Sent(f"a tunnel to {target.decode()}{what}", sent, [501])


def expectations(canary: bytes) -> Iterator[Sent]:
    """
    Requests with an Expect header, whose clients wait before sending the body.
    """
    expect = b"Expect: 100-continue\r\n"
    yield Sent("an expectation", post(expect, length(TASK)), [202], True)
    yield Sent("in capitals", post(b"EXPECT: 100-CONTINUE \r\n", length(TASK)), [202], True)
    yield Sent("an unknown one", post(b"Expect: 200-ok\r\n", length(TASK)), [202], True)
    yield Sent("in chunks", post(expect, CHUNKED, body=chunks(TASK) + LAST), [202], True)
    offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    yield Sent("with an offer", post(offer, expect, length(TASK)), [202], True)
    yield Sent("and nothing else", get(expect), [200], True)
    # The API never sent 100, so what follows may be the body or the next request.
    unasked = get(expect, length(canary))
    yield Sent("answered unasked, and a body that does not come", unasked, [200])
    part = get(expect, b"Content-Length: 5000\r\n", body=canary)
    yield Sent("answered unasked, and part of a body", part, [200])
    refused = get(expect, b"Content-Length: 5000\r\n", method=b"POST", target=b"/tasks")
    yield Sent("refused unasked", refused, [415])
    large = post(expect, b"Content-Length: 99999999\r\n", body=b"")
    yield Sent("a large body that was only announced", large, [413])
    old = b"POST /tasks HTTP/1.0\r\n" + JSON + expect + length(TASK) + b"\r\n" + TASK
    yield Sent("of HTTP/1.0, which has none", old, [202])


def lengths(canary: bytes) -> Iterator[Sent]:
    """
    Content-Length values that are almost numbers.
    """
    for text in LENGTHS:
        sent = post(b"Content-Length: %b\r\n" % text, body=canary)
        yield Sent(f"a length of {text!a}", sent, [400])
    for text in (b"0012", b"12 ", b"\t12", b" 12\t "):
        sent = post(b"Content-Length:%b\r\n" % text)
        yield Sent(f"a length of {text!a}, which is 12", sent, [202], True)
    yield Sent("a length of a petabyte", post(b"Content-Length: 1000000000000000\r\n"), [413])
    yield Sent("no length", post(body=b""), [400], True)
    yield Sent("a length of nothing", post(length(b""), body=b""), [400], True)
    yield Sent("a name with an underscore", post(b"Content_Length: 12\r\n", body=b""), [400], True)


LENGTHS = [
    *(b"+12", b"-12", b"-0", b"0x0c", b"1e1", b"12.0", b"1_2", b"12, 12", b"12,13", b"12 12"),
    *(
        b"12;q=1",
        b"12;",
        b'"12"',
        b"",
        b" ",
        b"twelve",
        b"\xd9\xa1\xd9\xa2",
        b"18446744073709551628",
    ),
    *(b"99999999999999999999999999", b"12\x00", b"12\x0b", b"\x0c12", b"1\t2", b"NaN"),
]


def two_framings(canary: bytes) -> Iterator[Sent]:
    """
    Requests whose end is ambiguous.
    """
    twelve, thirteen = b"Content-Length: 12\r\n", b"Content-Length: 13\r\n"
    body = LAST + canary
    for what, lines in {
        "a length and a coding": [length(body), CHUNKED],
        "a coding and a length": [CHUNKED, length(body)],
        "a length of nothing and a coding": [length(b""), CHUNKED],
        "a length and identity": [length(body), b"Transfer-Encoding: identity\r\n"],
        "a coding with an odd name and a length": [
            b"Transfer-Encoding : chunked\r\n",
            length(body),
        ],
        "a coding in two cases": [b"TRANSFER-encoding: Chunked\r\n", b"CONTENT-length: 5\r\n"],
        "two lengths": [twelve, thirteen],
        "two equal lengths": [twelve, twelve],
        "two lengths in two cases": [twelve, thirteen.upper()],
        "two lengths apart": [twelve, b"Accept: */*\r\n", length(b"")],
        "two codings": [CHUNKED, CHUNKED],
        "two codings, one unknown": [CHUNKED, b"Transfer-Encoding: cow\r\n"],
        "two codings, one unknown, first": [b"Transfer-Encoding: cow\r\n", CHUNKED],
    }.items():
        yield Sent(what, post(*lines, body=body), [400])


def codings(canary: bytes) -> Iterator[Sent]:
    """
    Transfer codings that another server might read as chunked.
    """
    for text, status in CODINGS.items():
        sent = post(b"Transfer-Encoding:%b\r\n" % text, body=LAST + canary)
        yield Sent(f"coding{text!a}", sent, [status])
    for text in (b" chunked", b"chunked", b"\tchunked", b" chunked ", b" Chunked", b" CHUNKED"):
        sent = post(b"Transfer-Encoding:%b\r\n" % text, body=chunks(TASK[:3], TASK[3:]) + LAST)
        yield Sent(f"coding{text!a} is fine", sent, [202], True)
    old = b"POST /tasks HTTP/1.0\r\n" + JSON + CHUNKED + b"\r\n" + chunks(TASK) + LAST
    yield Sent("a coding of HTTP/1.0, which has none", old + canary, [400])
    yield Sent("codings that are accepted", get(b"TE: trailers, chunked\r\n"), [200], True)


CODINGS = {
    b"": 400,
    b" ": 400,
    b" chunked\t": 400,
    b" \x0bchunked": 400,
    b" \x00chunked": 400,
    b" chunked\x00": 400,
    b" \xffchunked": 400,
    b" xchunked": 400,
    b" x chunked": 400,
    b" chunkedx": 400,
    b" chun\tked": 400,
    b" ch\xc3\xbanked": 400,
    b" chun\xe2\x84\xaaed": 400,
    b' "chunked"': 400,
    b" 'chunked'": 400,
    b" chunked;q=1": 400,
    b" chunked, chunked": 400,
    b" chunked,": 400,
    b" chunked, identity": 400,
    b" chunked, gzip": 400,
    b" identity": 400,
    b" gzip": 400,
    b" cow": 400,
    b"\r\n chunked": 400,
    b" \n chunked": 400,
    b" ,chunked": 501,
    b" identity, chunked": 501,
    b" gzip, chunked": 501,
    b" cow,chunked": 501,
}


def chunk_framings(canary: bytes) -> Iterator[Sent]:
    """
    Chunk sizes, chunk extensions and line endings.
    """
    for text in SIZES:
        sent = post(CHUNKED, body=text + b"\r\n" + canary)
        yield Sent(f"a chunk of {text!a}"[:60], sent, [400])
    for text in (
        b"c",
        b"C",
        b"0c",
        b"000000000000000c",
        b"c;a",
        b"c;a=b",
        b'c;a="b;c"',
        b"c;a=b;c",
    ):
        sent = post(CHUNKED, body=text + b"\r\n" + TASK + b"\r\n" + LAST)
        yield Sent(f"a chunk of {text!a}, which is 12", sent, [202], True)
    for what, body in {
        "longer than it says": b"2\r\n" + TASK + b"\r\n" + LAST + canary,
        "shorter than it says": b"d\r\n" + TASK + b"\r\n" + LAST + canary,
        "without its end": b"c\r\n" + TASK + LAST + canary,
        "with half its end": b"c\r\n" + TASK + b"\n" + LAST + canary,
        "with the wrong half": b"c\r\n" + TASK + b"\r" + LAST + canary,
        "with two ends": b"c\r\n" + TASK + b"\r\n\r\n" + LAST + canary,
        "after a bare line feed": b"c\n" + TASK + b"\r\n" + LAST + canary,
        "before a bare line feed": b"c\r\n" + TASK + b"\r\n0\n\n" + canary,
        "with an endless size": b"f" * 100_000,
        "with an endless extension": b"c;" + b"a" * 100_000 + b"\n",
    }.items():
        yield Sent(f"a chunk {what}", post(CHUNKED, body=body), [400])
    bytewise = chunks(*[bytes([byte]) for byte in TASK]) + LAST
    yield Sent("a chunk per byte", post(CHUNKED, body=bytewise), [202], True)
    yield Sent("chunks with a canary", post(CHUNKED, body=chunks(canary) + LAST), [400], True)
    yield Sent("no chunk at all", post(CHUNKED, body=LAST), [400], True)
    yield Sent("a long nothing", post(CHUNKED, body=b"000;a=b\r\n\r\n"), [400], True)
    # The request has been answered by the time the error shows up; the client would take a second
    # response for that of its next request.
    unread = get(CHUNKED, body=b"zzz\r\n" + canary)
    yield Sent("a wrong chunk of an unneeded body", unread, [400])


SIZES = [
    *(b"-c", b"+c", b"0xc", b"g", b"", b" c", b"c ", b"c\t", b"c\x00", b"c,c", b"c.0", b'"c"'),
    *(b"c;\x00", b"c;a=\x01", b'c;a="\x00"', b"c;a\n", b"c;a\r", b"1" + b"0" * 16, b"f" * 17),
    *(b"\xd9\xa1", b"c;a=b\nx", b"\r\nc", b"c c"),
]


def trailers(canary: bytes) -> Iterator[Sent]:
    """
    Trailers after the last chunk, which are not part of the head.
    """
    for what, lines in {
        "a checksum": b"X-Checksum: 1\r\n",
        "a type": b"Content-Type: text/plain\r\n",
        "another host": b"Host: elsewhere\r\n" * 2,
        "an expectation": b"Expect: 100-continue\r\n",
        "an offer": b"Upgrade: h2c\r\n",
    }.items():
        sent = post(CHUNKED, body=chunks(TASK) + b"0\r\n" + lines + b"\r\n")
        yield Sent(f"a trailer with {what}", sent, [202], True)
    for what, lines in {
        "a length": length(canary),
        "a coding": CHUNKED,
        "a farewell": b"Connection: close\r\n",
        "an upgrade": b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
        "a proxy's farewell": b"PROXY-connection: close\r\n",
        "nul": b"X-Odd: \x00\r\n",
        "a line that goes on": b"X-Odd: a\r\n b\r\n",
        "a bare line feed": b"X-Odd: a\nX: b\r\n",
        "no colon": b"nonsense\r\n",
    }.items():
        sent = post(CHUNKED, body=chunks(TASK) + b"0\r\n" + lines + b"\r\n" + canary)
        yield Sent(f"a trailer with {what}", sent, [400])


def header_lines(canary: bytes) -> Iterator[Sent]:
    """
    Header lines that two parsers may read differently.
    """
    for what, line in WRONG_LINES.items():
        yield Sent(what, get(line, body=canary), [400])
    for byte in b'\x00\x01\x09\x0b\x0c\x1f "(),/:;<=>?@[\\]{}\x7f\x80\xe4\xff':
        line = b"X%bOdd: a\r\n" % bytes([byte])
        status = 200 if byte in b":" else 400
        yield Sent(f"byte {byte:#04x} in a name", get(line, length(b"")), [status], status == 200)
    for byte in b"\x00\x01\x08\x0b\x0c\x0e\x1b\x1f\x7f":
        line = b"X-Odd: a%bb\r\n" % bytes([byte])
        yield Sent(f"byte {byte:#04x} in a value", get(line, body=canary), [400])
    for byte in b"\x09 \x21\x7e\x80\xa0\xff":
        line = b"X-Odd: a%bb\r\n" % bytes([byte])
        yield Sent(f"byte {byte:#04x} in a value is fine", get(line), [200], True)
    yield Sent("a value of nothing", get(b"X-Odd:\r\n", b"X-Even: \r\n"), [200], True)
    yield Sent("a name like no other", get(b"!#$%&'*+-.^_`|~0aZ: x\r\n"), [200], True)


WRONG_LINES = {
    "a line that goes on": b"X-Long: a\r\n b\r\n",
    "a line that goes on after a tab": b"X-Long: a\r\n\tb\r\n",
    "a line that goes on from nothing": b"X-Long:\r\n b\r\n",
    "a line that goes on without a first": b" b: c\r\n",
    "a hidden length": b"X-Long: a\r\n Content-Length: 500\r\n",
    "a bare line feed": b"X-Odd: a\nX-Even: b\r\n",
    "a length behind a bare line feed": b"X-Odd: a\nContent-Length: 500\r\n",
    "a bare carriage return": b"X-Odd: a\rX-Even: b\r\n",
    "a length behind a bare carriage return": b"X-Odd: a\rContent-Length: 500\r\n",
    "two carriage returns": b"X-Odd: a\r\r\n",
    "an end of bare line feeds": b"X-Odd: a\n\n",
    "a bare line feed at the end": b"X-Odd: a\r\n\n",
    "a space before the colon": b"X-Odd : a\r\n",
    "a tab before the colon": b"X-Odd\t: a\r\n",
    "a space before the length's colon": b"Content-Length : 500\r\n",
    "no name": b": a\r\n",
    "no colon": b"nonsense\r\n",
    "only a name and spaces": b"X-Odd \r\n",
}


def repeated_headers() -> Iterator[Sent]:
    """
    Repeated headers: two contradicting values, or a list.
    """
    for line in ONCE:
        what = f"{line.partition(b':')[0].decode()} twice"
        yield Sent(what, post(line, line, length(TASK)), [400])
        yield Sent(f"{what}, in two cases", post(line, line.upper(), length(TASK)), [400])
    for line in (b"Accept: */*\r\n", b"Cookie: a=b\r\n", b"X-Odd: a\r\n", b"Via: 1.1 a\r\n"):
        what = f"{line.partition(b':')[0].decode()} twice"
        yield Sent(what, post(line, line, length(TASK)), [202], True)
    nowhere = b"GET /health/live HTTP/1.1\r\n"
    yield Sent("no host", nowhere + b"\r\n", [400])
    yield Sent("two hosts", nowhere + b"Host: api\r\nHost: other\r\n\r\n", [400])
    yield Sent("a host, twice", nowhere + b"Host: api\r\nHost: api\r\n\r\n", [400])
    offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    yield Sent("no host, and an offer", nowhere + offer + b"\r\n", [400])


ONCE = [
    b"Authorization: Basic eDp5\r\n",
    b"Content-Encoding: identity\r\n",
    b"Content-Type: application/json\r\n",
    b"Expect: 100-continue\r\n",
    b"Host: api\r\n",
    b"Origin: null\r\n",
]


def large_heads() -> Iterator[Sent]:
    """
    Large heads: up to 64 KiB are accepted, and targets up to 32 KiB.
    """
    for size in (1_000, 10_000, 60_000):
        yield Sent(f"a header of {size}", get(b"X-Odd: " + b"y" * size + b"\r\n"), [200], True)
    for size in (70_000, 300_000):
        yield Sent(f"a header of {size}", get(b"X-Odd: " + b"y" * size + b"\r\n"), [431])
    yield Sent("a header without end", get()[:-2] + b"X-Odd: " + b"y" * 400_000, [431])
    yield Sent("5,000 headers", get(b"a: b\r\n" * 5_000), [200], True)
    yield Sent("20,000 headers", get(b"a: b\r\n" * 20_000), [431])
    yield Sent("a name of 70,000", get(b"a" * 70_000 + b": b\r\n"), [431])
    yield Sent("a target of 30,000", get(target=b"/" + b"a" * 30_000), [404], True)
    yield Sent("a query of 30,000", get(target=b"/health/live?" + b"a" * 30_000), [200], True)
    for size in (33_000, 70_000, 400_000):
        yield Sent(f"a target of {size}", get(target=b"/" + b"a" * size), [414])
        yield Sent(f"a query of {size}", get(target=b"/tasks?name=" + b"a" * size), [414])
    yield Sent("a method without end", b"A" * 100_000, [400])
    offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    large = get(offer, b"X-Odd: " + b"y" * 70_000 + b"\r\n")
    yield Sent("a large head with an offer", large, [431])


def request_lines(canary: bytes) -> Iterator[Sent]:
    """
    Request lines, and the first bytes of other protocols.
    """
    for what, line in WRONG_FIRST_LINES.items():
        yield Sent(what, line + b"\r\nHost: api\r\n\r\n" + canary, [400])
    for line in (b"\r\n", b"\r\n\r\n", b"\n"):
        yield Sent(f"{line!a} before the first line", line + get(), [200], True)
    for method in (b"PUT", b"DELETE", b"PATCH", b"TRACE", b"PURGE", b"SOURCE", b"MKCOL"):
        sent = get(length(canary), method=method, body=canary)
        yield Sent(f"method {method.decode()}", sent, [405], True)
    yield Sent("every method", get(method=b"OPTIONS"), [204], True)


WRONG_FIRST_LINES = {
    "a method in small letters": b"get /health/live HTTP/1.1",
    "an unknown method": b"SMUGGLE /health/live HTTP/1.1",
    "half a method": b"GE /health/live HTTP/1.1",
    "a method and a half": b"GETGET /health/live HTTP/1.1",
    "a method with nul": b"G\x00ET /health/live HTTP/1.1",
    "a space before the method": b" GET /health/live HTTP/1.1",
    "a tab after the method": b"GET\t/health/live HTTP/1.1",
    "no method": b"/health/live HTTP/1.1",
    "no target": b"GET HTTP/1.1",
    "nothing after the method": b"GET",
    "a space after the version": b"GET /health/live HTTP/1.1 ",
    "a word after the version": b"GET /health/live HTTP/1.1 x",
    "bare line feeds after the first line": b"GET /health/live HTTP/1.1\nHost: api\n\n",
    "bare carriage returns after the first line": b"GET /health/live HTTP/1.1\rHost: api\r",
    "a greeting of TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "a greeting of SSH": b"SSH-2.0-OpenSSH_9.6",
    "a greeting of SMTP": b"EHLO api",
    "a command of Redis": b"*1\r\n$4\r\nPING",
    "a header of PROXY": b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2",
    "a task": b'{"name":"x"}',
    "nothing but nul": b"\x00" * 20,
}


def targets() -> Iterator[Sent]:
    """
    Forms of the request target (RFC 9112 3.2), and invalid ones.
    """
    for target, status in TARGETS.items():
        # An answer from the application leaves the connection open.
        yield Sent(f"target {target!a}", get(target=target), [status], status != 400)
    yield Sent("every method of every path", get(method=b"OPTIONS", target=b"*"), [404], True)
    absolute = b"GET http://api/health/live HTTP/1.1\r\nHost: other\r\n\r\n"
    yield Sent("a URL for its Host", absolute, [200], True)
    yield Sent("a URL without Host", absolute.replace(b"Host: other\r\n", b""), [400])
    two = absolute.replace(b"other", b"other\r\nHost: third")
    yield Sent("a URL with two hosts", two, [400])
    offer = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
    yield Sent("a URL with an offer", get(offer, target=b"http://api/health/live"), [200], True)


TARGETS = {
    b"http://api/health/live": 200,
    b"HTTP://api:80/health/live?a=b": 200,
    b"https://api/health/live": 200,
    b"http://api": 307,
    b"http://api?a": 307,
    b"http://user@api/health/live": 400,
    b"http://user:word@api/health/live": 400,
    b"http:///health/live": 400,
    b"http:/health/live": 400,
    b"http:health/live": 400,
    b"ftp://api/health/live": 400,
    b"file:///etc/passwd": 400,
    b"javascript:alert(1)": 400,
    b"api:80": 400,
    b"api": 400,
    b"health/live": 400,
    b"?a=b": 400,
    b"*": 404,
    b"//health/live": 404,
    b"//api/health/live": 404,
    b"/health//live": 404,
    b"/./health/live": 404,
    b"/x/../health/live": 404,
    b"/%2e%2e/health/live": 404,
    b"/..%2f..%2fetc/passwd": 404,
    b"/health/live/": 404,
    b"/health/live;a=b": 404,
    b"/health/live%00": 404,
    b"/%00": 404,
    b"/tasks%0d%0aX-Odd:%20a": 404,
    b"/%": 404,
    b"/%zz": 404,
    b"/%ff%fe": 404,
    b"/%ed%a0%80": 404,
    b"/%c0%af": 404,
    b"/\\health\\live": 404,
    b"/health/live?%00": 200,
    b"/health/live?a=%ff": 200,
    b"/health/live?": 200,
    b"/health/live??": 200,
    b"/tasks?limit=%00": 422,
    b"/tasks?limit=0%0a": 422,
    b"/health/live#a": 400,
    b"/health/live?a#b": 400,
    b"/health/live\t": 400,
    b"/health/l\xc3\xadve": 400,
    b"/health/live\x00": 400,
    b"/health/live\x7f": 400,
}


def versions() -> Iterator[Sent]:
    """
    HTTP versions: supported, historic and foreign ones.
    """
    for version, status in VERSIONS.items():
        sent = b"GET /health/live %b\r\nHost: api\r\n\r\n" % version
        yield Sent(f"version {version!a}", sent, [status])
    yield Sent("no version", b"GET /health/live\r\n\r\n", [505])
    yield Sent("http/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505])
    for connection in (b"keep-alive", b"close", b"x"):
        sent = b"GET /health/live HTTP/1.0\r\nConnection: %b\r\n\r\n" % connection
        yield Sent(f"HTTP/1.0, {connection.decode()}", sent, [200])
    old = b"POST /tasks HTTP/1.0\r\n" + JSON + length(TASK) + b"\r\n" + TASK
    yield Sent("a task by HTTP/1.0", old, [202])


VERSIONS = {
    b"HTTP/1.0": 200,
    b"HTTP/0.9": 505,
    b"HTTP/1.2": 505,
    b"HTTP/2.0": 505,
    b"HTTP/3.0": 505,
    b"HTTP/9.9": 505,
    b"HTTP/1": 400,
    b"HTTP/11": 400,
    b"HTTP/1.": 400,
    b"HTTP/1.10": 400,
    b"HTTP/01.1": 400,
    b"HTTP/-1.1": 400,
    b"http/1.1": 400,
    b"HTTP 1.1": 400,
    b"HTTPS/1.1": 400,
    b"ICE/1.0": 400,
}


def unneeded_bodies(canary: bytes) -> Iterator[Sent]:
    """
    Requests with a body that the operation does not use; it is still a body.
    """
    nobody = b"/tasks/00000000-0000-7000-8000-000000000000"
    for method, target, status in (
        (b"GET", b"/health/live", 200),
        (b"GET", b"/tasks", 200),
        (b"GET", b"/nothing", 404),
        (b"GET", nobody, 404),
        (b"DELETE", nobody, 405),
        (b"PUT", b"/tasks", 405),
        (b"OPTIONS", b"/tasks", 204),
        (b"POST", b"/health/live", 405),
        (b"POST", b"/tasks", 415),
        (b"POST", b"/nothing", 404),
        (b"POST", nobody + b"/cancel", 415),
        (b"POST", nobody + b"/redrive", 415),
    ):
        what = f"{method.decode()} {target.decode()} with a canary"
        json = JSON if status == 404 else b""
        sent = get(json, length(canary), method=method, target=target, body=canary)
        yield Sent(what, sent, [status], True)
        sent = get(json, CHUNKED, method=method, target=target, body=chunks(canary) + LAST)
        yield Sent(what + " in a chunk", sent, [status], True)


def pipelines(canary: bytes) -> Iterator[Sent]:
    """
    Pipelined requests: answered in order, up to the first that ends the connection.
    """
    task = post(length(TASK))
    wrong = post(length(b"{"), body=b"{")
    yield Sent("two", task + get(), [202, 200], True)
    yield Sent("two the other way round", get() + task, [200, 202], True)
    yield Sent("a hundred", get() * 100, [200] * 100, True)
    yield Sent("a wrong task between", task + wrong + get(), [202, 400, 200], True)
    yield Sent("an unread body between", get(length(canary), body=canary) + task, [200, 202], True)
    yield Sent("line breaks between", get() + b"\r\n\r\n" + get(), [200, 200], True)
    yield Sent("nonsense after a task", task + b"nonsense\r\n\r\n" + canary, [202, 400])
    yield Sent("nonsense after two", task + get() + b"\x00" + canary, [202, 200, 400])
    yield Sent("two lengths after a task", task + post(length(b""), length(b"a")), [202, 400])
    large = task + get(b"X-Odd: " + b"y" * 70_000 + b"\r\n")
    yield Sent("a large head after a task", large, [202, 431])
    yield Sent("a tunnel after a task", task + get(method=b"CONNECT", target=b"a:1"), [202, 501])
    bad_chunk = post(CHUNKED, body=b"zzz\r\n" + canary)
    yield Sent("a wrong chunk after a task", task + bad_chunk, [202, 400])
    yield Sent("a farewell before a canary", get(b"Connection: close\r\n") + canary, [200])
    farewell = post(b"Connection: close\r\n", length(TASK))
    yield Sent("a farewell, a task and a canary", farewell + canary, [202])
    old = b"GET /health/live HTTP/1.0\r\n\r\n"
    yield Sent("HTTP/1.0 before a canary", old + canary, [200])
    ends_early = post(b"Content-Length: 12\r\n", body=b"{") + b"GET /health/live HTTP/1.1\r\n\r\n"
    yield Sent("two, the first without end", ends_early, [400, 400])


def half_closed(canary: bytes) -> Iterator[Sent]:
    """
    Half-closed connections: complete requests are answered, and incomplete ones change nothing.
    """
    task = post(length(TASK))
    cancel = canary.removesuffix(b"\r\n") + JSON
    for what, sent, answers in (
        ("after nothing", b"", []),
        ("in a first line", b"GET /health/li", []),
        ("in a head", get()[:-2], []),
        ("after a request", get(), [200]),
        ("after a task", task, [202]),
        ("after a task in chunks", post(CHUNKED, body=chunks(TASK) + LAST), [202]),
        ("after three requests", task + get() + task, [202, 200, 202]),
        ("in a body", task[:-1], []),
        ("in a chunk without end", post(CHUNKED, body=b"7" + b"f" * 15 + b"\r\n" + canary), []),
        ("in a chunk", post(CHUNKED, body=chunks(TASK)[:-4]), []),
        ("before the last chunk", post(CHUNKED, body=chunks(TASK)), []),
        ("before the end of the last chunk", post(CHUNKED, body=chunks(TASK) + b"0\r\n"), []),
        ("in the second head", task + get()[:-2], [202]),
        ("in an offer", post(b"Connection: Upgrade\r\nUpgrade: h2c\r\n", length(TASK)), [202]),
        ("in a canary's head", cancel, []),
        ("in a canary's body", cancel + b"Content-Length: 3\r\n\r\n{}", []),
        ("in a canary's chunk", cancel + CHUNKED + b"\r\n3\r\n{}", []),
    ):
        yield Sent(f"half closed {what}", sent, answers, leaves=True)
    bad_chunk = cancel + CHUNKED + b"\r\nzzz\r\n"
    yield Sent("a canary with a wrong chunk", bad_chunk, [400])
