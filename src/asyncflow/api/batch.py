"""
A batch as it was sent: its tasks, and in a partial batch the errors of those that are invalid.

An error inside a task is that task's; an error anywhere else is the batch's. Its place tells which,
whether strict JSON or the model found it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from pydantic import ValidationError

from asyncflow.api.field_errors import refused_document
from asyncflow.errors import InvalidPayload, InvalidTask
from asyncflow.jsontext import ERRORS_MAX, parse, salvage
from asyncflow.wire.batches import SubmitBatch
from asyncflow.wire.submissions import SubmitTask

Refused: TypeAlias = InvalidTask | InvalidPayload
T = TypeVar("T")

ROW_ERRORS_MAX = 5
"""How many errors of each task of a partial batch are listed."""

_ROW = re.compile(r"/tasks/([0-9]+)(?:/|$)")


def read_batch(body: bytes) -> tuple[list[SubmitTask | Refused], bool]:
    """
    The tasks of a batch in their order, and whether it is partial.

    Raises:
        MalformedJson: It is not JSON.
        InvalidTask: There is an error outside of a task, or the batch is not partial.
    """
    document, refusals = _parsed(body)
    try:
        batch = SubmitBatch.model_validate(document)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
        whole = refused_document(mistakes, SubmitBatch)
        if not _is_partial(document):
            raise whole from None
        wrong = _by_row(((_row_of(mistake["loc"]), mistake) for mistake in mistakes), whole)
        for row, its_mistakes in wrong.items():
            told = refused_document(its_mistakes, SubmitBatch, limit=ROW_ERRORS_MAX)
            refusals.setdefault(row, told)
        tasks = document["tasks"]
        return [refusals.get(n) or SubmitTask.model_validate(t) for n, t in enumerate(tasks)], True
    return [refusals.get(n) or task for n, task in enumerate(batch.tasks)], batch.partial


def together(refusals: Sequence[Refused]) -> Refused:
    """
    The refusal of a whole batch: an `InvalidPayload` if all of them are, else an `InvalidTask`.
    """
    errors = [one for error in refusals for one in error.errors][:ERRORS_MAX]
    count = sum(error.count for error in refusals)
    names = {error.name for error in refusals if isinstance(error, InvalidPayload)}
    if all(isinstance(error, InvalidPayload) for error in refusals):
        return InvalidPayload(", ".join(sorted(names)), errors, count=count)
    return InvalidTask(errors, count=count)


def _parsed(body: bytes) -> tuple[Any, dict[int, Refused]]:
    """
    The document, and in a partial batch the tasks that strict JSON refuses.
    """
    try:
        return parse(body), {}
    except InvalidTask as whole:
        document, errors = salvage(body)
        if not _is_partial(document):
            raise
        wrong = _by_row(((_row_at(one.pointer), one) for one in errors), whole)
        return document, {
            row: InvalidTask(its_errors[:ROW_ERRORS_MAX], count=len(its_errors))
            for row, its_errors in wrong.items()
        }


def _is_partial(document: Any) -> bool:
    return isinstance(document, dict) and document.get("partial") is True


def _by_row(found: Iterable[tuple[int | None, T]], whole: InvalidTask) -> dict[int, list[T]]:
    by_row: dict[int, list[T]] = {}
    for row, one in found:
        if row is None:
            raise whole from None
        by_row.setdefault(row, []).append(one)
    return by_row


def _row_of(location: Sequence[int | str]) -> int | None:
    match location:
        case ("tasks", int(row), *_):
            return row
        case _:
            return None


def _row_at(pointer: str) -> int | None:
    found = _ROW.match(pointer)
    return int(found[1]) if found else None
