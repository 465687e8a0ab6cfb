"""
The errors of Pydantic and JSON Schema as sentences that say what would be accepted.

Every `detail` continues its pointer: "/priority must be at most 9".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema_rs
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from asyncflow.domain.policy import NAME_PATTERN
from asyncflow.errors import FieldError, InvalidTask
from asyncflow.jsontext import ERRORS_MAX, pointer_to
from asyncflow.wire.batches import SubmitBatch
from asyncflow.wire.submissions import SubmitTask
from asyncflow.wire.tasks import CURSOR_PATTERN, TaskQuery

_EXPECTED = {
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "dict_type": "must be an object",
    "list_type": "must be an array",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
    "missing": "is required",
}


def refused_document(
    mistakes: Sequence[ErrorDetails], model: type[BaseModel], *, limit: int = ERRORS_MAX
) -> InvalidTask:
    """
    What is wrong with a body that is not a `model`: the first errors, and how many there are.
    """
    errors = [
        FieldError(
            pointer_to(*mistake["loc"]), _sentence(mistake, _fields_at(mistake["loc"], model))
        )
        for mistake in mistakes[:limit]
    ]
    return InvalidTask(errors, count=len(mistakes))


def parameter_errors(error: RequestValidationError) -> tuple[list[tuple[str, str]], int]:
    """
    The first invalid query parameters, each with what is wrong with it; and how many there are.
    """
    fields = list(TaskQuery.model_fields)
    mistakes = error.errors()
    # ("query", name), followed by the index of the value if there can be several.
    errors = [
        (str(mistake["loc"][1]), _sentence(mistake, fields)) for mistake in mistakes[:ERRORS_MAX]
    ]
    return errors, len(mistakes)


def payload_errors(
    errors: Iterator[jsonschema_rs.ValidationError], pointer: str
) -> Iterator[FieldError]:
    """
    Every error of a payload that breaks its handler's JSON Schema.

    Args:
        pointer: The payload's place in the document.
    """
    for error in errors:
        place = pointer + pointer_to(*error.instance_path)
        match error.kind:
            case jsonschema_rs.ValidationErrorKind.Required(property=key):
                yield FieldError(place + pointer_to(key), "is required")
            case jsonschema_rs.ValidationErrorKind.AdditionalProperties(unexpected=keys):
                for key in keys:
                    yield FieldError(
                        place + pointer_to(key), "is not a key that the handler accepts"
                    )
            case _:
                yield FieldError(place, f"does not fit the handler's schema: {error.message}")


def _fields_at(location: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    inside_a_task = model is SubmitBatch and len(location) > 1
    return list((SubmitTask if inside_a_task else model).model_fields)


def _sentence(mistake: Any, fields: list[str]) -> str:
    kind, limits = mistake["type"], mistake.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return _unknown(str(mistake["loc"][-1]), fields)
        case "greater_than_equal":
            return f"must be at least {limits['ge']:.15g}"
        case "less_than_equal":
            return f"must be at most {limits['le']:.15g}"
        case "too_short":
            return f"must have at least {limits['min_length']} item"
        case "too_long":
            return f"must have at most {limits['max_length']} items"
        case "string_pattern_mismatch" if limits["pattern"] == f"^{NAME_PATTERN.pattern}$":
            return "must be 1-128 characters from [A-Za-z0-9._-]"
        case "string_pattern_mismatch" if limits["pattern"] == CURSOR_PATTERN:
            return "is not a cursor; pass the `next_cursor` of the page before"
        case "literal_error":
            return f"must be one of {limits['expected'].replace(chr(39), '')}"
        case "value_error":
            return str(limits["error"])
        case _:
            return _EXPECTED.get(kind) or f"is wrong: {mistake['msg']}"


def _unknown(name: str, fields: list[str]) -> str:
    close = difflib.get_close_matches(name[:100], fields, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"is not known{hint}; allowed are {', '.join(fields)}"
