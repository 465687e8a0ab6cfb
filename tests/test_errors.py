"""
The error tree is complete, matches its drawing, and agrees with the published problems.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import asyncflow
from asyncflow import errors
from asyncflow.api.problems import KINDS
from asyncflow.errors import (
    AsyncFlowError,
    BrokerUnreachable,
    InvalidSettings,
    QueueNotFound,
    Retry,
    StatementRefused,
    StoreUnavailable,
    TaskNotFound,
    WorkerExhausted,
)

_MODULES = [
    module.name
    for module in pkgutil.walk_packages(asyncflow.__path__, "asyncflow.")
    if not module.name.endswith(("__main__", ".migrations.env"))
]


def test_every_error_is_in_the_one_file() -> None:
    """
    Every error class is in `errors`; no other module declares one.
    """
    for name in _MODULES:
        importlib.import_module(name)

    modules = {error.__module__ for error in _subclasses(AsyncFlowError)}
    assert {"asyncflow.errors"} == {m for m in modules if m.startswith("asyncflow.")}


def test_the_drawn_tree_is_the_tree() -> None:
    """
    The drawing at the top of `errors` has each class under its base, and no other.
    """
    assert _tree(AsyncFlowError) == _drawn()


@pytest.mark.parametrize("error", [e for e in vars(errors).values() if inspect.isclass(e)])
def test_errors_agree_with_the_published_problems(error: type) -> None:
    """
    A problem type that a class names is published, with the class's status.
    """
    if issubclass(error, AsyncFlowError) and (kind := error.__dict__.get("problem_type")):
        assert KINDS[kind].status == error.http_status


def test_exit_statuses() -> None:
    """
    Exit status 1 means try again later, 2 invalid as it stands, 3 not found, 70 a worker without
    free slots.
    """
    expected: dict[type[AsyncFlowError], int] = {
        StoreUnavailable: 1,
        BrokerUnreachable: 1,
        InvalidSettings: 2,
        StatementRefused: 2,
        TaskNotFound: 3,
        QueueNotFound: 3,
        WorkerExhausted: 70,
    }

    assert expected == {error: error.exit_status for error in expected}


@pytest.mark.parametrize("seconds", [-1, float("nan"), 86_400 * 365 + 1])
def test_a_retry_waits_at_most_a_year(seconds: float) -> None:
    """
    A longer delay is refused, and the error says what would have worked.
    """
    with pytest.raises(ValueError, match=r"must be between 0 and 31,536,000"):
        Retry(after_seconds=seconds)


class _Line(NamedTuple):
    name: str
    base: str


def _subclasses(error: type[AsyncFlowError]) -> Iterator[type[AsyncFlowError]]:
    for below in error.__subclasses__():
        yield below
        yield from _subclasses(below)


def _tree(error: type[AsyncFlowError]) -> set[_Line]:
    return {
        _Line(below.__name__, below.__base__.__name__)
        for below in _subclasses(error)
        if below.__module__ == "asyncflow.errors" and below.__base__ is not None
    }


def _drawn() -> set[_Line]:
    above = {0: "AsyncFlowError"}
    lines = set()
    for indent, name in re.findall(r"(?m)^ {4}([│ ]*)[├└]── (\w+)", errors.__doc__ or ""):
        depth = len(indent) // 4
        lines.add(_Line(name, above[depth]))
        above[depth + 1] = name
    return lines
