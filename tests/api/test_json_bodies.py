"""
A corpus of bad JSON: each document is a client error, none causes a 500, and none is stored.
"""

from __future__ import annotations

import json
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.errors import InvalidTask, MalformedJson
from asyncflow.jsontext import DEPTH_MAX, parse

HEADERS = {"Content-Type": "application/json"}


def in_payload(text: str) -> bytes:
    return b'{"name":"x","payload":{"a":' + text.encode() + b"}}"


def nested(depth: int, opening: str, closing: str) -> bytes:
    # The document and the payload count as two levels.
    return in_payload(opening * (depth - 2) + "1" + closing * (depth - 2))


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "spaces": b" \n\t ",
    "byte order mark": b'\xef\xbb\xbf{"name":"x"}',
    "utf-16": '{"name":"x"}'.encode("utf-16"),
    "utf-16 without mark": '{"name":"x"}'.encode("utf-16-le"),
    "utf-32": '{"name":"x"}'.encode("utf-32"),
    "latin-1": '{"name":"é"}'.encode("latin-1"),
    "half a character": b'{"name":"\xc3',
    "overlong slash": b'{"name":"\xc0\xaf"}',
    "surrogate in utf-8": b'{"name":"\xed\xa0\x80"}',
    "beyond unicode": b'{"name":"\xf5\x80\x80\x80"}',
    "word": b"hello",
    "open object": b'{"name":"x"',
    "open string": b'{"name":"x',
    "open array": b"[1",
    "only an opening": b"{",
    "closing too many": b'{"name":"x"}}',
    "two documents": b'{"name":"x"}{"name":"y"}',
    "trailing word": b'{"name":"x"} x',
    "trailing nul": b'{"name":"x"}\x00',
    "trailing comma": b'{"name":"x",}',
    "trailing comma in array": in_payload("[1,]"),
    "missing comma": b'{"name":"x" "queue":"y"}',
    "missing colon": b'{"name" "x"}',
    "missing value": b'{"name":}',
    "double colon": b'{"name"::"x"}',
    "single quotes": b"{'name':'x'}",
    "bare key": b'{name:"x"}',
    "number as key": b'{1:"x"}',
    "comment": b'{"name":"x"} // hello',
    "block comment": b'/* hello */{"name":"x"}',
    "raw newline in string": b'{"name":"x\n"}',
    "raw tab in string": b'{"name":"x\t"}',
    "raw nul in string": b'{"name":"x\x00"}',
    "bad escape": b'{"name":"\\x41"}',
    "short escape": b'{"name":"\\u12"}',
    "escape of no hex": b'{"name":"\\u12g4"}',
    "leading zero": in_payload("012"),
    "leading plus": in_payload("+1"),
    "leading dot": in_payload(".5"),
    "trailing dot": in_payload("5."),
    "bare exponent": in_payload("1e"),
    "hexadecimal": in_payload("0x10"),
    "underscore": in_payload("1_000"),
    "only minus": in_payload("-"),
    "two minuses": in_payload("--1"),
    "arabic digits": in_payload("٣"),
    "capital true": in_payload("True"),
    "undefined": in_payload("undefined"),
    "nan in small letters": in_payload("nan"),
    "form": b"name=x",
    "xml": b"<task/>",
    "yaml": b"name: x",
    "pickle": b"\x80\x04\x95\x00",
    "gzip": b"\x1f\x8b\x08\x00\x00",
    "vertical tab as space": b'{"name":\x0b"x"}',
    "no-break space": '{"name":\u00a0"x"}'.encode(),
}

REFUSED: dict[str, tuple[bytes, list[str]]] = {
    "nan": (in_payload("NaN"), ["/payload/a"]),
    "infinity": (in_payload("Infinity"), ["/payload/a"]),
    "minus infinity": (in_payload("[1,-Infinity]"), ["/payload/a/1"]),
    "1e999": (in_payload("1e999"), ["/payload/a"]),
    "-1e999": (in_payload('{"b":-1e999}'), ["/payload/a/b"]),
    "2^63": (in_payload("9223372036854775808"), ["/payload/a"]),
    "-2^63-1": (in_payload("-9223372036854775809"), ["/payload/a"]),
    "5000 digits": (in_payload("9" * 5000), ["/payload/a"]),
    "a million digits": (in_payload("1" * 390_000), ["/payload/a"]),
    "escaped nul": (in_payload('"x\\u0000y"'), ["/payload/a"]),
    "escaped nul in a list": (in_payload('[0,"\\u0000"]'), ["/payload/a/1"]),
    "escaped nul in a key": (in_payload('{"\\u0000":1}'), ["/payload/a/\x00"]),
    "high surrogate alone": (in_payload('"\\ud800"'), ["/payload/a"]),
    "low surrogate alone": (in_payload('"\\udc00"'), ["/payload/a"]),
    "surrogates reversed": (in_payload('"\\udf89\\ud83c"'), ["/payload/a"]),
    "surrogate then letter": (in_payload('"\\uD83Cx"'), ["/payload/a"]),
    "backslash before half a pair": (in_payload('"\\\\\\ud800"'), ["/payload/a"]),
    "backslash between two halves": (in_payload('"\\ud83c\\\\\\udf89"'), ["/payload/a"]),
    "backslashes before nul": (in_payload('"\\\\\\\\\\u0000"'), ["/payload/a"]),
    "surrogate in a key": (in_payload('{"\\ud800":1}'), ["/payload/a/?"]),
    "twice the same key": (in_payload('1,"a":1'), ["/payload/a"]),
    "three times the same key": (in_payload('1,"a":2,"a":3'), ["/payload/a"]),
    "twice the same key, escaped": (in_payload('1,"\\u0061":1'), ["/payload/a"]),
    "name twice": (b'{"name":"x","name":"y"}', ["/name"]),
    "empty key twice": (in_payload('{"":1,"":2}'), ["/payload/a/"]),
    "odd keys twice": (in_payload('{"~/":1,"~/":2}'), ["/payload/a/~0~1"]),
    "several faults": (
        in_payload('[NaN,{"b":1,"b":"\\u0000"},1e999]'),
        ["/payload/a/0", "/payload/a/1/b", "/payload/a/1/b", "/payload/a/2"],
    ),
    "too many arrays": (nested(DEPTH_MAX + 1, "[", "]"), [""]),
    "too many objects": (nested(DEPTH_MAX + 1, '{"b":', "}"), [""]),
    "20,000 arrays": (nested(20_000, "[", "]"), [""]),
    "20,000 objects": (nested(20_000, '{"b":', "}"), [""]),
    "deep and doubled": (in_payload('{"b":1,"b":' + "[" * 5000 + "]" * 5000 + "}"), [""]),
}

ACCEPTED: dict[str, bytes] = {
    "largest integer": in_payload("9223372036854775807"),
    "smallest integer": in_payload("-9223372036854775808"),
    "zeroes": in_payload("[0,-0,0.0,-0.0,0e0,1e-999]"),
    "largest double": in_payload("1.7976931348623157e308"),
    "surrogate pair": in_payload('"\\ud83c\\udf89"'),
    "escaped backslash before u0000": in_payload('"\\\\u0000"'),
    "escaped backslash before ud800": in_payload('"\\\\ud800"'),
    "four backslashes before u0000": in_payload('"\\\\\\\\u0000"'),
    "brackets in strings": in_payload('"' + "[{" * 500 + '"'),
    "quotes and brackets in strings": in_payload('["' + '\\"[{\\\\' * 500 + '"]'),
    "many brackets side by side": in_payload("[" + ",".join(['{"b":[]}'] * 500) + "]"),
    "deepest": nested(DEPTH_MAX, "[", "]"),
    "deepest objects": nested(DEPTH_MAX, '{"b":', "}"),
    "spaces everywhere": b' \r\n\t{ "name" :\n"x" , "payload" : { } } \n',
    "odd characters": in_payload('"\\u007f\\u2028\\ufffe\\uffff\U0010ffff"'),
    "same key at two depths": in_payload('{"a":{"a":1}}'),
    "empty key": in_payload('{"":1}'),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
async def test_what_is_no_json_is_malformed(offline_client: httpx.AsyncClient, body: bytes) -> None:
    """
    Both endpoints that read a body answer 400.
    """
    answers = [
        await offline_client.post(path, content=body, headers=HEADERS)
        for path in ("/tasks", "/tasks/batch")
    ]

    for answer in answers:
        assert 400 == answer.status_code
        assert "application/problem+json" == answer.headers["content-type"]
        assert "/problems/malformed-json" == answer.json()["type"]


@pytest.mark.parametrize(("body", "pointers"), REFUSED.values(), ids=REFUSED)
async def test_json_that_cannot_be_kept_is_refused_with_pointers(
    offline_client: httpx.AsyncClient, body: bytes, pointers: list[str]
) -> None:
    """
    The answer is 422 with a pointer to each place, before the database is accessed.
    """
    answer = await offline_client.post("/tasks", content=body, headers=HEADERS)

    assert 422 == answer.status_code
    assert "/problems/invalid-task" == answer.json()["type"]
    assert pointers == [error["pointer"] for error in answer.json()["errors"]]


@pytest.mark.parametrize("body", ACCEPTED.values(), ids=ACCEPTED)
async def test_odd_but_good_json_is_taken_and_given_back(
    client: httpx.AsyncClient, body: bytes
) -> None:
    """
    Unusual but valid JSON is accepted, and the payload that is returned equals the one that was
    sent.
    """
    submitted = await client.post("/tasks", content=body, headers=HEADERS)
    shown = await client.get(submitted.headers["location"])

    assert 202 == submitted.status_code
    assert shown.json()["payload"] == json.loads(body)["payload"]


async def test_the_sentence_tells_where_the_json_breaks(
    offline_client: httpx.AsyncClient,
) -> None:
    """
    The error names line and column, counted as in an editor.
    """
    answer = await offline_client.post("/tasks", content=b'{"name":\n  oops}', headers=HEADERS)

    assert "The body is not JSON: expecting value at line 2, column 3." == answer.json()["detail"]


def test_thousands_of_faults_are_listed_briefly() -> None:
    """
    The answer to a hostile body is bounded, not a thousand times its size.
    """
    with pytest.raises(InvalidTask) as refused:
        parse(b"[" + b"NaN," * 100_000 + b"1]")

    assert 20 == len(refused.value.errors)


def test_a_very_long_document_is_refused_without_a_search() -> None:
    """
    The error in a very long document is not located: that would hold up every other client.
    """
    with pytest.raises(InvalidTask) as refused:
        parse(b"[" + b"1," * 1_000_000 + b"NaN]")

    assert [""] == [fault.pointer for fault in refused.value.errors]


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b'["' + b"\\u0041" * 150_000 + b'"]',
        b"[" + b'"\\ud83c\\udf89",' * 60_000 + b"1]",
        b"[" + b"[],{}," * 150_000 + b"1]",
        b"[" + b'"[",' * 250_000 + b"1]",
        b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
        b"[" + b"1" * 1_000_000 + b"]",
        b'"' + b"\\" * 1_000_000,
        b"[" + b"1," * 400_000 + b'{"a":1,"a":2}]',
        b"[" + b"NaN," * 250_000 + b"1]",
        b'["' + b"\\\\" * 400_000 + b'\\u0000"]',
        b'["' + b"\\\\u" * 300_000 + b'"]',
    ],
    ids=lambda body: repr(body[:12]),
)
def test_a_megabyte_of_anything_is_judged_quickly(body: bytes) -> None:
    """
    No body stops the event loop for long: the work grows linearly with its size.
    """
    began = time.process_time()
    try:
        parse(body)
    except (MalformedJson, InvalidTask):
        pass

    assert time.process_time() - began < 1.0


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=30,
)


@given(json_values, st.booleans())
def test_every_good_value_is_read_as_it_was_written(value: object, escaped: bool) -> None:
    """
    Every value that JSON can express and PostgreSQL can store passes unchanged, escaped or not.
    """
    assert parse(json.dumps(value, ensure_ascii=escaped).encode()) == value


@given(st.text("\\u0dDcC8{[", max_size=60))
def test_escapes_are_judged_as_the_parser_reads_them(inside: str) -> None:
    """
    However backslashes, NULs and surrogates are combined, a text is refused if and only if the
    parsed value could not be stored.
    """
    body = f'["{inside}"]'
    try:
        [text] = json.loads(body)
        text.encode()
        storable = "\x00" not in text
    except json.JSONDecodeError:
        with pytest.raises(MalformedJson):
            parse(body.encode())
        return
    except UnicodeEncodeError:
        storable = False

    if storable:
        assert parse(body.encode()) == [text]
    else:
        with pytest.raises(InvalidTask) as refused:
            parse(body.encode())
        assert {"/0"} == {fault.pointer for fault in refused.value.errors}


@given(st.binary())
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """
    No input makes the reader raise an unexpected error.
    """
    try:
        parse(body)
    except (MalformedJson, InvalidTask):
        pass
