"""
A corpus of about 400 request bodies that are invalid, nearly invalid, or valid but suspicious, each
with the expected reaction of the API.

`test_json_bodies` has bodies written individually, alongside the parser; here every part of a
document is combined with every kind of damage.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from asyncflow.domain.policy import NAME_PATTERN


class Body(NamedTuple):
    """
    One body for `POST /tasks`.

    Attributes:
        what: A unique description.
        text: The bytes that are sent.
        kind: The expected problem, a key of `KINDS`; None if the body is accepted.
        fact: A regular expression that the problem's sentence or pointer must match.
    """

    what: str
    text: bytes
    kind: str | None = None
    fact: str = ""


MALFORMED = "malformed-json"
INVALID = "invalid-task"

GOOD = (
    '{"name":"x","payload":{"a":"é🎉\\ud83c\\udf89\\n","b":[1,-2.5e3,true,null,{}]},"priority":7}'
)


def in_payload(value: str) -> bytes:
    """
    A task whose payload has this JSON text as its `a`.
    """
    return b'{"name":"x","payload":{"a":' + value.encode() + b"}}"


def corpus() -> Iterator[Body]:
    """
    All bodies.
    """
    yield from truncated()
    yield from poked()
    yield from brackets_in_disorder()
    yield from every_type_in_every_field()
    yield from nearly_times()
    yield from numerals()
    yield from strings()
    yield from keys()
    yield from encodings()
    yield from whole_documents_of_other_types()


def truncated() -> Iterator[Body]:
    """
    A valid document, truncated at each position.
    """
    whole = GOOD.encode()
    for length in range(1, len(whole), 2):
        yield Body(f"the first {length} bytes", whole[:length], MALFORMED, "is not (JSON|UTF-8)")


def poked() -> Iterator[Body]:
    """
    A valid document with one extra byte, inside a string and between two tokens.
    """
    whole = GOOD.encode()
    places = {"in a string": whole.index(b"x") + 1, "between tokens": whole.index(b":")}
    for (where, at), byte in itertools.product(places.items(), POKES):
        text = whole[:at] + bytes([byte]) + whole[at:]
        if where == "in a string" and byte == 0x7F:
            # To JSON this is an ordinary character, but a name may not contain it.
            yield Body(f"byte {byte:#x} {where}", text, INVALID, "/name must be 1-128 characters")
        else:
            yield Body(f"byte {byte:#x} {where}", text, MALFORMED, "is not (JSON|UTF-8)")


POKES = [0x00, 0x01, 0x08, 0x0B, 0x1B, 0x1F, 0x7F, 0x80, 0xA0, 0xBF, 0xC0, 0xE2, 0xED, 0xF8, 0xFF]


def brackets_in_disorder() -> Iterator[Body]:
    """
    Brackets that do not match, or are never closed.
    """
    for value in ("[}", "{]", "[[]", "{}}", "[1}", '{"b":1]', '["b":1]', "{1}", "[,]", "{,}"):
        yield Body(f"brackets {value}", in_payload(value), MALFORMED, "is not JSON")
    unclosed = b'{"name":"x","payload":{"a":['
    yield Body("100 unclosed brackets", unclosed + b"[" * 99, MALFORMED, "is not JSON")
    yield Body("100,000 of them", unclosed + b"[" * 99_999, INVALID, "nested too deeply")
    for opening, closing in (('[{"b":', "}]"), ('{"b":[', "]}")):
        deep = opening * 40 + "1" + closing * 40
        yield Body(f"{opening} 40 times", in_payload(deep), INVALID, "nested too deeply")


def every_type_in_every_field() -> Iterator[Body]:
    """
    Every field of a task with values of every type; `FITS` says which are valid.
    """
    for (field, fits), (what, value) in itertools.product(FITS.items(), VALUES.items()):
        task = {"name": "x", field: value}
        kind = None if fits(value) else INVALID
        yield Body(f"{field} is {what}", json.dumps(task).encode(), kind, f"/{field}(/| |$)")


def _is_number(value: Any, low: float, high: float, *, whole: bool = False) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return False
    return low <= value <= high


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and NAME_PATTERN.fullmatch(value) is not None


FITS: dict[str, Callable[[Any], bool]] = {
    "name": _is_name,
    "payload": lambda value: isinstance(value, dict),
    "queue": lambda value: value is None or _is_name(value),
    "priority": lambda value: _is_number(value, 0, 9, whole=True),
    "run_at": lambda value: value is None,
    "delay_seconds": lambda value: value is None or _is_number(value, 0, 34_560_000),
    "max_attempts": lambda value: value is None or _is_number(value, 1, 1_000, whole=True),
    "timeout_seconds": lambda value: value is None or _is_number(value, 0.001, 604_800),
    "expires_at": lambda value: value is None,
    "Name": lambda value: False,
    "__proto__": lambda value: False,
}

VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "an empty text": "",
    "a text": "text",
    "a long text": "y" * 50_000,
    "a numeral as text": "5",
    "1": 1,
    "-1": -1,
    "2.5": 2.5,
    "1e300": 1e300,
    "-0.0": -0.0,
    "a number of 19 digits": 9_000_000_000_000_000_000,
    "an empty list": [],
    "a list of lists": [[[]]],
    "an empty object": {},
    "an object": {"name": "y", "$ref": "#"},
}


def nearly_times() -> Iterator[Body]:
    """
    RFC 3339 times, near misses, and PostgreSQL's special values.
    """
    for time in TIMES:
        yield Body(f"run_at {time}", json.dumps({"name": "x", "run_at": time}).encode())
    for time in TIMES[-2:]:
        expires = {"name": "x", "expires_at": time}
        yield Body(f"expires_at {time}", json.dumps(expires).encode())
    for time in NO_TIMES:
        text = json.dumps({"name": "x", "run_at": time}).encode()
        yield Body(f"run_at {time!a} is none", text, INVALID, "/run_at must be an RFC 3339 time")
    for time in ("0001-01-01T00:00:00Z", "1970-01-01T00:00:00Z"):
        text = json.dumps({"name": "x", "expires_at": time}).encode()
        yield Body(f"expires_at {time}", text, INVALID, "/expires_at must be later than now")


TIMES = [
    "2032-02-29T00:00:00Z",
    "2031-01-01t00:00:00z",
    "2031-01-01 00:00:00+00:00",
    "2031-01-01T00:00:00.1Z",
    "2031-01-01T00:00:00.123456789Z",
    "2031-01-01T00:00:00-00:00",
    "2031-01-01T00:00:00+23:59",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59.999999Z",
    "9999-12-31T23:59:59.9999999Z",
]
NO_TIMES = [
    "2031-02-29T00:00:00Z",
    "2031-00-01T00:00:00Z",
    "2031-13-01T00:00:00Z",
    "2031-01-00T00:00:00Z",
    "2031-01-32T00:00:00Z",
    "2031-01-01T25:00:00Z",
    "2031-01-01T00:60:00Z",
    "2031-12-31T23:59:60Z",
    "2031-01-01T00:00:00",
    "2031-01-01T00:00Z",
    "2031-01-01T00:00:00,5Z",
    "2031-01-01T00:00:00.Z",
    "2031-01-01T00:00:00.1234567890Z",
    "2031-01-01T00:00:00+24:00",
    "2031-01-01T00:00:00+01",
    "2031-01-01T00:00:00+0100",
    "2031-01-01T00:00:00 Z",
    "2031-01-01T00:00:00ZZ",
    "2031-01-01T00:00:00Z\n",
    " 2031-01-01T00:00:00Z",
    "2031-01-01T00:00:00\N{MINUS SIGN}01:00",
    "2031\N{EN DASH}01\N{EN DASH}01T00:00:00Z",
    "\N{FULLWIDTH DIGIT TWO}031-01-01T00:00:00Z",
    "20310101T000000Z",
    "2031-W01-1T00:00:00Z",
    "2031-001T00:00:00Z",
    "2031-1-1T0:0:0Z",
    "31-01-01T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "10000-01-01T00:00:00Z",
    "-2031-01-01T00:00:00Z",
    "+2031-01-01T00:00:00Z",
    "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:59-00:01",
    "01/02/2031",
    "1900000000",
    "now",
    "epoch",
    "infinity",
    "-infinity",
    "allballs",
]


def numerals() -> Iterator[Body]:
    """
    Numbers at the limits of what can be stored, and invalid numerals.
    """
    for numeral in KEPT_NUMERALS:
        yield Body(f"numeral {numeral[:30]}", in_payload(numeral))
    for numeral in REFUSED_NUMERALS:
        what = f"numeral {numeral[:30]} is too large"
        yield Body(what, in_payload(numeral), INVALID, "/payload/a is (an integer beyond|too l)")
    for numeral in NO_NUMERALS:
        yield Body(f"numeral {numeral!a} is none", in_payload(numeral), MALFORMED, "is not JSON")


KEPT_NUMERALS = [
    "1e-400",
    "-1e-400",
    "0.1e1",
    "1e+2",
    "1E2",
    "0e999999",
    "123456789012345678901234567890.0",
    "0." + "1" * 5_000,
    "1" * 19,
    "5e-324",
    "1.7976931348623157E+308",
    "1e-" + "9" * 1_000,
]
REFUSED_NUMERALS = [
    "1E400",
    "-1E400",
    "1" + "0" * 400 + ".0",
    "1e" + "9" * 1_000,
    "9" * 19,
    "-" + "9" * 19,
    "1" * 4_301,
]
NO_NUMERALS = [
    "1e5.5",
    "1.e5",
    "0x",
    "0b1",
    "0o7",
    "1__0",
    "1e+",
    "++1",
    "Inf",
    "-NaN",
    "1n",
    "1/2",
    "1,5",
    "1 000",
    "\N{DEVANAGARI DIGIT ONE}",
    "\N{FULLWIDTH DIGIT ONE}",
    "1e\N{DEVANAGARI DIGIT FIVE}",
    "\N{VULGAR FRACTION ONE HALF}",
]


def strings() -> Iterator[Body]:
    """
    Texts with a special meaning to a shell, a log, a template or a database. Each is accepted as
    plain text, as a value and as a key.
    """
    for what, text in TEXTS.items():
        yield Body(f"text: {what}", json.dumps({"name": "x", "payload": {"a": text}}).encode())
        as_key = json.dumps({"name": "x", "payload": {text: 1}}, ensure_ascii=False)
        yield Body(f"key: {what}", as_key.encode())


TEXTS = {
    "ANSI escape": "\x1b[31mred\x1b[0m",
    "header injection": "a\r\nSet-Cookie: b=c\r\n\r\n",
    "log injection": '"}\n{"event":"forged"}',
    "lookup": "${jndi:ldap://127.0.0.1/a}",
    "template": "{{7*7}}${7*7}<%= 7*7 %>",
    "markup": "<script>alert(1)</script>",
    "statement": "'; DROP TABLE asyncflow.tasks; --",
    "place holders": "$1 %s %n {0} :name ?",
    "array literal": '{"a",NULL,\\"}',
    "right to left": "\u202etxt.exe",
    "invisible": "\u200b\u200d\ufeff",
    "no characters": "\ufffe\uffff\U0001fffe",
    "the last character": "\U0010ffff",
    "many marks": "e" + "\u0301" * 1_000,
    "a family": "👨‍👩‍👧‍👦" * 100,
    "separators": "\u2028\u2029\x85",
    "all controls": "".join(map(chr, range(1, 32))) + "\x7f",
    "backslashes": "\\" * 1_001,
    "quotes": '"' * 1_001,
    "90,000 letters": "y" * 90_000,
    "property names": "__proto__",
    "nothing": "",
}


def keys() -> Iterator[Body]:
    """
    Duplicate keys, and keys that only look like duplicates.
    """
    yield Body("keys that differ in case", in_payload('{"k":1,"K":2}'))
    yield Body("keys that look alike", in_payload('{"\\u00e9":1,"e\\u0301":2}'))
    yield Body("keys that differ in a space", in_payload('{"k":1,"k ":2}'))
    many = ",".join(f'"k{i}":0' for i in range(1_000))
    deep = '{"b":' * 30 + '{"c":1,"c":1}' + "}" * 30
    doubled = {
        "payload": '{"name":"x","payload":{},"payload":{}}',
        "priority": '{"name":"x","priority":1,"priority":1}',
        "an unknown field": '{"name":"x","y":1,"y":2}',
        "an escaped one": '{"name":"x","payl\\u006fad":{},"payload":{}}',
        "the first of many": f'{{"name":"x","payload":{{{many},"k0":0}}}}',
        "a deep one": f'{{"name":"x","payload":{{"a":{deep}}}}}',
    }
    for what, text in doubled.items():
        yield Body(f"{what} is there twice", text.encode(), INVALID, "appears twice")


def encodings() -> Iterator[Body]:
    """
    A valid document in other encodings than UTF-8.
    """
    for encoding, text in ENCODED.items():
        yield Body(encoding, text, MALFORMED, "UTF-8|is not JSON")
    document = '{"name":"x"}'
    mark = "\N{ZERO WIDTH NO-BREAK SPACE}"
    yield Body("two byte order marks", (mark * 2 + document).encode(), MALFORMED, AT_THE_MARK)
    yield Body("a byte order mark at the end", (document + mark).encode(), MALFORMED, "is not JSON")
    inside = document.replace(":", ":" + mark, 1)
    yield Body("a byte order mark between tokens", inside.encode(), MALFORMED, "is not JSON")
    yield Body("a byte order mark in a text", in_payload(f'"{mark}"'))


AT_THE_MARK = "byte order mark|is not JSON"

ENCODED = {
    "utf-7": b"+AHsAIg-name+ACIAOgAi-x+ACIAfQ-",
    "utf-16, big end first": '{"name":"x"}'.encode("utf-16-be"),
    "utf-32, little end first": '{"name":"x"}'.encode("utf-32-le"),
    "utf-32, big end first": '{"name":"x"}'.encode("utf-32-be"),
    "EBCDIC": '{"name":"x"}'.encode("cp500"),
    "gb18030": '{"name":"漢"}'.encode("gb18030"),
    "Shift JIS": '{"name":"漢"}'.encode("shift-jis"),
    "Big5": '{"name":"漢"}'.encode("big5"),
    "KOI8-R": '{"name":"ж"}'.encode("koi8-r"),
    "windows-1252": '{"name":"€"}'.encode("windows-1252"),
}


def whole_documents_of_other_types() -> Iterator[Body]:
    """
    Valid JSON that is not an object.
    """
    for text in (
        "null",
        "true",
        "0",
        "-1.5",
        '"x"',
        "[]",
        "[[]]",
        '[{"name":"x"}]',
        '["name","x"]',
    ):
        yield Body(f"only {text}", text.encode(), INVALID, "must be an object")
