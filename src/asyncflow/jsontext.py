"""
JSON as PostgreSQL can keep it: read strictly, written compactly, with RFC 6901 pointers.

`parse` accepts what PostgreSQL, JavaScript and every handler can read. Python's parser accepts
more; refused here are duplicate keys, NaN and infinities, integers beyond 64 bits, NUL and lone
surrogates in strings, deep nesting, any encoding but UTF-8 (RFC 8259 §8.1), and a byte order
mark. A good document costs one pass of the C parser and a few searches in C. Only a suspicious
one is walked in Python, to say where it is wrong.

`encode` and `storable_json` are for values of our own process, whose odd characters are
replaced instead of refused.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from asyncflow.errors import FieldError, InvalidTask, MalformedJson

DEPTH_MAX = 64
"""Levels of nesting that `parse` accepts."""

INTEGER_MIN, INTEGER_MAX = -(2**63), 2**63 - 1
ERRORS_MAX = 20
"""An error lists no more wrong places than this."""

WALKED_LENGTH_MAX = 1_000_000
"""Longer documents are refused without saying where: finding out would take seconds."""

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
"""A value of plain JSON types as compact text."""

# Backslashes pair up from the left: after an even number of them, `\\u0000` is NUL.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_ESCAPES = re.compile(r"\\(?:u0000|.)")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_NOT_A_BRACKET = re.compile(r"[^\[\]{}]+")
_STEPS = {"{": 1, "[": 1, "}": -1, "]": -1}
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(body: bytes) -> Any:
    """
    The value `body` stands for.

    Raises:
        MalformedJson: It is not JSON in UTF-8.
        InvalidTask: It is JSON that cannot be kept, with a pointer to each wrong place.
    """
    text = _text(body)
    try:
        value = _decoded(text, _DECODER)
    except _Suspicion:
        raise _refusal(text) from None
    # Escapes are the only way in: raw NULs are no JSON and raw surrogates no UTF-8.
    if "\\u" in text and (_NUL.search(text) or _has_half_a_pair(text, value)):
        raise _refusal(text)
    return value


def salvage(body: bytes) -> tuple[Any, Iterator[FieldError]]:
    """
    What `parse` refused as `InvalidTask`: the value, read leniently, and every wrong place.

    Only parts without a wrong place are as they were sent.

    Raises:
        InvalidTask: It is wrong as a whole, or too long to say where.
    """
    text = _text(body)
    if len(text) > WALKED_LENGTH_MAX:
        raise _refusal(text)
    errors = _walk(_decoded(text, _MARKING_DECODER))
    return _LENIENT_DECODER.decode(text), errors


def is_deeper(text: str, depth_max: int) -> bool:
    """
    Whether JSON text is nested more deeply than this.
    """
    if text.count("{") + text.count("[") <= depth_max:
        return False
    # Strings end where they seem to, as `text` is JSON.
    brackets = _NOT_A_BRACKET.sub("", _STRING.sub("", text))
    return max(itertools.accumulate(map(_STEPS.__getitem__, brackets))) > depth_max


def utf8_length(text: str) -> int:
    """
    The bytes that `text` takes in UTF-8.
    """
    return len(text) if text.isascii() else len(text.encode())


def storable(text: str) -> str:
    """
    `text` with NUL and lone surrogates replaced by U+FFFD.
    """
    return _without_surrogates(text.replace("\x00", "\ufffd"))


def storable_json(text: str) -> str:
    """
    JSON text, as `encode` writes it, with the same replaced in its strings.
    """
    if "\\u0000" in text:
        text = _ESCAPES.sub(lambda m: "\ufffd" if m[0] == "\\u0000" else m[0], text)
    return _without_surrogates(text)


def pointer_to(*steps: str | int) -> str:
    """
    The JSON pointer that leads through these keys and indexes.
    """
    return "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)


def first_errors(errors: Iterable[FieldError]) -> tuple[list[FieldError], int]:
    """
    As many of them as are listed, and how many there are.
    """
    rest = iter(errors)
    listed = list(itertools.islice(rest, ERRORS_MAX))
    return listed, len(listed) + sum(1 for _ in rest)


def _text(body: bytes) -> str:
    if not body.strip():
        raise MalformedJson("The body is empty; send a JSON object.")
    if body.startswith((b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe")) or b"\x00" in body[:4]:
        raise MalformedJson("The body must be UTF-8 without a byte order mark.")
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not UTF-8: byte {error.start} is wrong.") from None


def _decoded(text: str, decoder: json.JSONDecoder) -> Any:
    try:
        value = decoder.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedJson(
            f"The body is not JSON: {_lowered(error.msg)} at line {error.lineno}, "
            f"column {error.colno}."
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if is_deeper(text, DEPTH_MAX):
        raise _too_deep()
    return value


class _Suspicion(Exception):
    """
    Something to examine again, slowly.
    """


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Suspicion
    return value


def _integer(digits: str) -> int:
    # Python refuses to read thousands of digits; no 64-bit integer has more than twenty.
    if len(digits) > 20 or not INTEGER_MIN <= (value := int(digits)) <= INTEGER_MAX:
        raise _Suspicion
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Suspicion
    return value


def _constant(name: str) -> Any:
    raise _Suspicion


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_float,
    parse_constant=_constant,
)


def _has_half_a_pair(text: str, value: Any) -> bool:
    if not _SURROGATE_ESCAPE.search(text):
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _too_deep() -> InvalidTask:
    return InvalidTask(
        [FieldError("", f"is nested too deeply; at most {DEPTH_MAX} levels are accepted")]
    )


_SOMETHING_ODD = (
    "has something that cannot be stored: a duplicate key, NaN or an infinity, a number beyond 64 "
    "bits, NUL or half of a surrogate pair in a string"
)


class _Pairs(list[tuple[str, Any]]):
    """
    An object with its keys in order and duplicates kept.
    """


class _Odd:
    """
    A number or constant that cannot be kept.
    """

    def __init__(self, detail: str) -> None:
        self.detail = detail


def _marked_integer(digits: str) -> Any:
    try:
        return _integer(digits)
    except _Suspicion:
        return _Odd("is an integer beyond 64 bits; send it as a string")


def _marked_float(digits: str) -> Any:
    try:
        return _float(digits)
    except _Suspicion:
        return _Odd("is too large for a number; send it as a string")


def _marked_constant(name: str) -> Any:
    return _Odd(f"is {name}, which JSON does not have; send null or a string")


_MARKING_DECODER = json.JSONDecoder(
    object_pairs_hook=_Pairs,
    parse_int=_marked_integer,
    parse_float=_marked_float,
    parse_constant=_marked_constant,
)
_LENIENT_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:20]))


def _refusal(text: str) -> InvalidTask:
    if len(text) > WALKED_LENGTH_MAX:
        return InvalidTask([FieldError("", _SOMETHING_ODD)])
    errors, count = first_errors(_walk(_decoded(text, _MARKING_DECODER)))
    return InvalidTask(errors, count=count)


def _walk(root: Any) -> Iterator[FieldError]:
    stack = [iter([("", root)])]
    while stack:
        for pointer, value in stack[-1]:
            match value:
                case _Odd(detail=detail):
                    yield FieldError(pointer, detail)
                case str():
                    yield from _text_errors(pointer, value, "contains")
                case _Pairs():
                    yield from _key_errors(pointer, value)
                    stack.append(_members(pointer, value))
                    break
                case list():
                    stack.append(_items(pointer, value))
                    break
        else:
            stack.pop()


def _members(pointer: str, pairs: _Pairs) -> Iterator[tuple[str, Any]]:
    return ((pointer + pointer_to(key), value) for key, value in pairs)


def _items(pointer: str, values: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{pointer}/{index}", value) for index, value in enumerate(values))


def _key_errors(pointer: str, pairs: _Pairs) -> Iterator[FieldError]:
    seen: set[str] = set()
    doubled: set[str] = set()
    for key, _ in pairs:
        if key in seen and key not in doubled:
            doubled.add(key)
            yield FieldError(pointer + pointer_to(key), "appears twice; a key may appear once")
        seen.add(key)
        yield from _text_errors(pointer + pointer_to(key), key, "is a key with")


def _text_errors(pointer: str, text: str, verb: str) -> Iterator[FieldError]:
    if "\x00" in text:
        yield FieldError(pointer, f"{verb} the character NUL (\\u0000), which cannot be stored")
    if _SURROGATE.search(text):
        yield FieldError(pointer, f"{verb} half of a surrogate pair, which is not a character")


def _without_surrogates(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        # UTF-16 joins two halves that belong together and replaces the others.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
