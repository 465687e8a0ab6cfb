"""
Writes docs/states.md, every state and transition of a task, from `asyncflow.domain.states`.

    python docs/make_states.py

A test fails if the page and the table disagree.
"""

from __future__ import annotations

import ast
import inspect
from enum import StrEnum
from pathlib import Path

from asyncflow.domain.states import TERMINAL, TRANSITIONS, Event, State

PAGE = Path(__file__).with_name("states.md")

INTRODUCTION = """\
# States of a task

Written by `docs/make_states.py` from `src/asyncflow/domain/states.py`; do not edit.

Every statement that moves a task is guarded: it changes the row only if the task is in the
state where the arrow begins and, out of `running`, only under the lease of the current claim.
A late or repeated statement therefore changes nothing. Some arrows have several such
statements: a claim, for example, takes due tasks or those that RabbitMQ delivered.

The API shows two more statuses that are not states: a `pending` task with a future `run_at` is
`RETRYING` if an attempt of this generation has failed, and `SCHEDULED` otherwise.
`POST /tasks/{id}/run-now` sets its `run_at` to now without changing its state.
"""


def page() -> str:
    """
    The whole page as text.
    """
    return "\n".join(
        [INTRODUCTION, *_chart(), "", *_table("State", State), "", *_table("Transition", Event), ""]
    )


def _chart() -> list[str]:
    arrows = [
        f"    {at} --> {to}: {why}" for at, ways in TRANSITIONS.items() for why, to in ways.items()
    ]
    ends = [f"    {state} --> [*]" for state in State if state in TERMINAL]
    return ["```mermaid", "stateDiagram-v2", "    [*] --> pending: submit", *arrows, *ends, "```"]


def _table(title: str, kind: type[StrEnum]) -> list[str]:
    meanings = _meanings(kind)
    rows = [f"| `{member}` | {meanings[member.name]} |" for member in kind]
    return [f"| {title} | Meaning |", "|---|---|", *rows]


def _meanings(kind: type[StrEnum]) -> dict[str, str]:
    # Python drops the strings below the members, so they are read from the source.
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for assignment, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(assignment, ast.Assign) and isinstance(text, ast.Expr):
            (name,) = assignment.targets
            meanings[ast.unparse(name)] = " ".join(ast.literal_eval(text.value).split())
    return meanings


if __name__ == "__main__":
    PAGE.write_text(page())
