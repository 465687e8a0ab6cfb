"""
What handlers return and raise, as text that PostgreSQL can always store.

JSON here is strict: no NaN, no Infinity. NUL and lone surrogates, which `jsonb` and UTF-8
refuse, become U+FFFD: an odd character must not cost the whole result. Which outcome
follows from the text is decided in `handlers/calls`.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import traceback
from types import TracebackType
from typing import Any

from asyncflow.jsontext import encode, is_deeper, storable, storable_json, utf8_length

RESULT_BYTES_MAX = 1 << 20
RESULT_DEPTH_MAX = 512
"""Deeper JSON comes close to what PostgreSQL's parser accepts on its default stack."""

MESSAGE_BYTES_MAX = 4 << 10
TRACEBACK_BYTES_MAX = 16 << 10
KIND_BYTES_MAX = 256

LOST_COROUTINE = (
    "The handler returned a coroutine that is never awaited. Declare the handler `async def`; "
    "if a decorator hides that, let the decorator return an `async def` function."
)


class Unstorable(Exception):
    """
    A result that no retry will make storable; `kind` is a stable word, the text a sentence.
    """

    def __init__(self, kind: str, sentence: str) -> None:
        self.kind = kind
        super().__init__(sentence)


def encode_result(value: Any, *, bytes_max: int = RESULT_BYTES_MAX) -> str:
    """
    Write what a handler returned as JSON text.

    Plain JSON types cost one call of the standard encoder. Besides them there may be dataclasses,
    sets and generators, and whatever Pydantic can write: models, datetimes, UUIDs, Decimals, enums,
    UTF-8 bytes. What one value becomes, a key above all, does not depend on its neighbours.

    Args:
        bytes_max: Most bytes of UTF-8 that the text may take.

    Raises:
        Unstorable: If the value is not JSON, or too large or too deep to be stored.
    """
    if value is None:
        return "null"
    try:
        text = encode(value)
    except TypeError:
        text = _encode_rich(value, bytes_max)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _not_json(value, error) from error
    text = storable_json(text)
    size = utf8_length(text)
    if size > bytes_max:
        raise Unstorable(
            "ResultTooLarge",
            f"The result takes {size} bytes as JSON; at most {bytes_max} are kept. "
            "Store large results elsewhere and return where they are.",
        )
    if is_deeper(text, RESULT_DEPTH_MAX):
        raise Unstorable(
            "InvalidResult", f"The result is nested more than {RESULT_DEPTH_MAX} levels deep."
        )
    return text


def error_kind(error: BaseException) -> str:
    """
    The qualified name of the error's class; a built-in's without its module.
    """
    kind = type(error)
    try:
        name = kind.__qualname__
        if kind.__module__ not in ("builtins", "__main__"):
            name = f"{kind.__module__}.{name}"
        return clip(name, KIND_BYTES_MAX)
    except BaseException:
        # A metaclass can make anything of these names.
        return "Exception"


def error_message(error: BaseException) -> str:
    """
    The error's own text, at most 4 KB; says so when the error cannot be printed.
    """
    try:
        return clip(str(error), MESSAGE_BYTES_MAX)
    except BaseException as second:
        return f"(the error cannot be printed: its __str__ raised {error_kind(second)})"


def error_traceback(error: BaseException) -> str | None:
    """
    The error's traceback from the handler's first line on, at most 16 KB of UTF-8.

    Longer ones lose their middle: the beginning tells where the handler was, the end what
    happened. None if it cannot be formatted.
    """
    try:
        error_from_handler = error.with_traceback(_without_our_frames(error.__traceback__))
        lines = traceback.TracebackException.from_exception(error_from_handler, compact=True)
        text = "".join(lines.format())
    except BaseException:
        return None
    return clip_traceback(text)


def clip_traceback(text: str) -> str:
    """
    A traceback as PostgreSQL can store it, without its middle if it is longer than 16 KB.
    """
    text = storable(text)
    data = text.encode()
    if len(data) <= TRACEBACK_BYTES_MAX:
        return text
    head = data[: TRACEBACK_BYTES_MAX // 4].decode(errors="ignore")
    tail = data[-(TRACEBACK_BYTES_MAX // 4 * 3 - 32) :].decode(errors="ignore")
    return f"{head}\n  … shortened …\n{tail}"


def clip(text: str, bytes_max: int) -> str:
    """
    `text` as PostgreSQL can store it, cut to `bytes_max` bytes of UTF-8; "…" marks a cut.
    """
    data = storable(text[: bytes_max + 1]).encode()
    if len(data) <= bytes_max:
        return data.decode()
    return data[: bytes_max - 3].decode(errors="ignore") + "…"


def _encode_rich(value: Any, bytes_max: int) -> str:
    if inspect.iscoroutine(value):
        value.close()
        raise Unstorable("InvalidResult", LOST_COROUTINE)
    try:
        return encode(_plain(value, items_max=bytes_max // 2 + 1))
    except Exception as error:  # serialising may run the user's own code, which may raise anything
        raise _not_json(value, error) from error


def _plain(value: Any, *, items_max: int) -> Any:
    """
    `value` in plain JSON types; the standard encoder writes those, and keys of them, as ever.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {_plain_key(k): _plain(v, items_max=items_max) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, items_max=items_max) for item in value]
    if inspect.isgenerator(value):
        # It may have no end. An item takes two bytes or more, so what is left out here could not
        # be kept anyway.
        return [_plain(item, items_max=items_max) for item in itertools.islice(value, items_max)]
    if _is_plain_dataclass(value):
        fields = dataclasses.fields(value)
        return {f.name: _plain(getattr(value, f.name), items_max=items_max) for f in fields}
    return _as_pydantic_writes(value)


def _plain_key(key: Any) -> Any:
    if key is None or isinstance(key, str | int | float):
        return key
    [written] = _as_pydantic_writes({key: None})
    return written


def _is_plain_dataclass(value: Any) -> bool:
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return False
    return not hasattr(value, "__pydantic_serializer__")


def _as_pydantic_writes(value: Any) -> Any:
    # Importing pydantic costs 100 ms and 12 MB; only results that need it pay.
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)


def _not_json(value: Any, error: BaseException) -> Unstorable:
    return Unstorable(
        "InvalidResult",
        f"The handler returned a value of type {type(value).__qualname__} that cannot be "
        f"written as JSON: {error_message(error)}",
    )


def _without_our_frames(tb: TracebackType | None) -> TracebackType | None:
    first = tb
    while tb is not None and tb.tb_frame.f_globals.get("__name__") == "asyncflow.handlers.calls":
        tb = tb.tb_next
    return tb if tb is not None else first
