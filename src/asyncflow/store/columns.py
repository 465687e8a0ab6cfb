"""
The columns of `tasks` as SQL, from their declaration in `domain.task`.

Everything here is computed when the module is imported; nothing reflects per row.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from datetime import datetime
from typing import Any, NamedTuple, get_args, get_type_hints
from uuid import UUID

from asyncflow.domain.task import COMPUTED, Claim, NewTask, Task

_TYPES: dict[Any, str] = {
    int: "int",
    float: "float8",
    str: "text",
    UUID: "uuid",
    datetime: "timestamptz",
}


class Parameter(NamedTuple):
    """
    A field of `NewTask` as SUBMIT takes it: one array for all tasks.

    Attributes:
        type: Of its elements, in PostgreSQL.
        has_default: It may be None, or 0, in every task of a batch.
    """

    name: str
    type: str
    has_default: bool


def _parameter(name: str, hint: Any) -> Parameter:
    python_type, *_ = [arg for arg in get_args(hint) or (hint,) if arg is not type(None)]
    return Parameter(name, _TYPES[python_type], has_default=name in NewTask._field_defaults)


SUBMITTED = tuple(_parameter(name, hint) for name, hint in get_type_hints(NewTask).items())

_READ = [field for field in fields(Task) if field.name not in COMPUTED]

LISTED = tuple(field.name for field in _READ if field.default is MISSING)
"""Columns of a task in a list."""

DETAILED = tuple(field.name for field in _READ if field.default is not MISSING)
"""Columns that are read for one task only."""

_CLAIMED_AS = {"task_id": "id", "claimed_at": "started_at"}

CLAIMED = tuple(_CLAIMED_AS.get(name, name) for name in Claim._fields)
"""Columns of a claim, in the order of `Claim`."""


def of_task(columns: tuple[str, ...]) -> str:
    """
    A list of columns for SELECT or RETURNING, where the task is `t`.
    """
    return ", ".join(f"t.{column}" for column in columns)
