"""
JSON, strictly: bytes to values that PostgreSQL, JavaScript and every handler can take.

Python's parser is generous where others are not. Refused here: duplicate keys, NaN and
infinities, integers beyond 64 bits, NUL and lone surrogates in strings, deep nesting, any
encoding but UTF-8 (RFC 8259 §8.1), a byte order mark.

A good document costs one pass of the C parser and a few searches in C. Only a suspicious
one is walked in Python, to say where it is wrong.
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
INTEGER_MIN, INTEGER_MAX = -(2**63), 2**63 - 1
ERRORS_MAX = 20
"""More wrong places than this are not listed."""

WALKED_LENGTH_MAX = 1_000_000
"""Longer documents are refused without saying where they are wrong: it would take seconds."""

# Backslashes pair up from the left: after an even number of them, `\\u0000` is NUL.
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')
_NOT_A_BRACKET = re.compile(r"[^\[\]{}]+")
_ONE_KIND = str.maketrans("{}", "[]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(body: bytes) -> Any:
    """
    The value `body` stands for.

    Raises:
        MalformedJson: It is not JSON in UTF-8.
        InvalidTask: It is JSON that cannot be kept, with a pointer to each wrong place.
    """
    text = _decoded(body)
    try:
        value = _DECODER.decode(text)
    except _Suspicion:
        raise _refusal(text) from None
    except json.JSONDecodeError as error:
        raise MalformedJson(
            f"The body is not JSON: {_lowered(error.msg)} at line {error.lineno}, "
            f"column {error.colno}."
        ) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(text)
    # Escapes are the only way in: raw NULs are no JSON and raw surrogates no UTF-8.
    if "\\u" in text and (_NUL.search(text) or _has_half_a_pair(text, value)):
        raise _refusal(text)
    return value


def salvage(body: bytes) -> tuple[Any, Iterator[FieldError]]:
    """
    What `parse` refused as `InvalidTask`: the value, read generously, and every wrong place.

    Only what holds no wrong place is as it was sent.

    Raises:
        InvalidTask: It is wrong as a whole, or too long to say where.
    """
    text = _decoded(body)
    if len(text) > WALKED_LENGTH_MAX:
        raise _refusal(text)
    faults = _walk(_slowly_parsed(text))
    return _GENEROUS_DECODER.decode(text), faults


def _decoded(body: bytes) -> str:
    if not body.strip():
        raise MalformedJson("The body is empty; send a JSON object.")
    if body.startswith((b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe")) or b"\x00" in body[:4]:
        raise MalformedJson("The body must be UTF-8 without a byte order mark.")
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise MalformedJson(f"The body is not UTF-8: byte {error.start} is wrong.") from None


class _Suspicion(Exception):
    """
    Something to look at again, slowly.
    """


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _Suspicion
    return value


def _integer(digits: str) -> int:
    # Python refuses to read thousands of digits; nobody else reads more than twenty.
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


def _check_depth(text: str) -> None:
    if text.count("{") + text.count("[") > DEPTH_MAX and _is_too_deep(text):
        raise _too_deep()


def _is_too_deep(text: str) -> bool:
    # `text` is JSON by now, so strings end where they seem to. Each round takes the
    # innermost level away, in C.
    brackets = _NOT_A_BRACKET.sub("", _STRING.sub("", text)).translate(_ONE_KIND)
    for _ in range(DEPTH_MAX):
        brackets = brackets.replace("[]", "")
    return bool(brackets)


def _too_deep() -> InvalidTask:
    return InvalidTask(
        [FieldError("", f"is nested too deeply; at most {DEPTH_MAX} levels are kept")]
    )


_SOMETHING_ODD = (
    "holds something that cannot be kept: a key twice, NaN or an infinity, a number beyond 64 "
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


def _checked_integer(digits: str) -> Any:
    if len(digits) > 20 or not INTEGER_MIN <= int(digits) <= INTEGER_MAX:
        return _Odd("is an integer beyond 64 bits; send it as a string")
    return None


def _checked_float(digits: str) -> Any:
    if math.isinf(float(digits)):
        return _Odd("is too large for a number; send it as a string")
    return None


def _checked_constant(name: str) -> Any:
    return _Odd(f"is {name}, which JSON does not have; send null or a string")


_SLOW_DECODER = json.JSONDecoder(
    object_pairs_hook=_Pairs,
    parse_int=_checked_integer,
    parse_float=_checked_float,
    parse_constant=_checked_constant,
)


_GENEROUS_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits[:20]))


def first_errors(faults: Iterable[FieldError]) -> tuple[list[FieldError], int]:
    """
    As many of them as are listed, and how many there are.
    """
    rest = iter(faults)
    listed = list(itertools.islice(rest, ERRORS_MAX))
    return listed, len(listed) + sum(1 for _ in rest)


def _refusal(text: str) -> InvalidTask:
    if len(text) > WALKED_LENGTH_MAX:
        return InvalidTask([FieldError("", _SOMETHING_ODD)])
    faults, count = first_errors(_walk(_slowly_parsed(text)))
    return InvalidTask(faults, count=count)


def _slowly_parsed(text: str) -> Any:
    try:
        root = _SLOW_DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedJson(
            f"The body is not JSON: {_lowered(error.msg)} at line {error.lineno}, "
            f"column {error.colno}."
        ) from None
    except RecursionError:
        raise _too_deep() from None
    _check_depth(text)
    return root


def _walk(root: Any) -> Iterator[FieldError]:
    stack = [iter([("", root)])]
    while stack:
        for pointer, value in stack[-1]:
            match value:
                case _Odd(detail=detail):
                    yield FieldError(pointer, detail)
                case str():
                    yield from _text_errors(pointer, value, "holds")
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
    return ((joined(pointer, key), value) for key, value in pairs)


def _items(pointer: str, values: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{pointer}/{index}", value) for index, value in enumerate(values))


def _key_errors(pointer: str, pairs: _Pairs) -> Iterator[FieldError]:
    seen: set[str] = set()
    doubled: set[str] = set()
    for key, _ in pairs:
        if key in seen and key not in doubled:
            doubled.add(key)
            yield FieldError(joined(pointer, key), "appears twice; a key may appear once")
        seen.add(key)
        yield from _text_errors(joined(pointer, key), key, "is a key with")


def _text_errors(pointer: str, text: str, verb: str) -> Iterator[FieldError]:
    if "\x00" in text:
        yield FieldError(pointer, f"{verb} the character NUL (\\u0000), which cannot be stored")
    if _SURROGATE.search(text):
        yield FieldError(pointer, f"{verb} half of a surrogate pair, which is no character")


def joined(pointer: str, key: str) -> str:
    """
    The JSON pointer of `key` under `pointer`.
    """
    return f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]
