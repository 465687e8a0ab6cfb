"""
Rules that are written once stay written once: "may start now", and the end of a task.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from asyncflow import store
from asyncflow.domain.states import TERMINAL
from asyncflow.store import admission, claims, due, hints, read, unserved
from tests.store.test_statements import STATEMENTS

SOURCES = [*Path(store.__path__[0]).glob("*.py")]

NOT_PAUSED = f"NOT {admission.is_paused('')}".partition("q.name = ")[0]
OFFERED = admission.is_offered("").removesuffix(")")

WHOLE = (admission.may_start(names="").removesuffix(")"),)

ANSWERS = {
    "CLAIM_DUE": (claims.CLAIM_DUE, {*WHOLE, admission.IS_PENDING, NOT_PAUSED}),
    "CLAIM_DUE_SINCE": (claims.CLAIM_DUE_SINCE, {*WHOLE, admission.IS_PENDING, NOT_PAUSED}),
    "CLAIM_HINTED": (claims.CLAIM_HINTED, {*WHOLE, NOT_PAUSED}),
    # The relay asks twice: which queues, then which tasks.
    "OPEN_QUEUES": (hints.OPEN_QUEUES, {NOT_PAUSED}),
    "ADMISSIBLE": (due.ADMISSIBLE, {*WHOLE, admission.IS_PENDING}),
    "ADMISSIBLE_SINCE": (due.ADMISSIBLE_SINCE, {*WHOLE, admission.IS_PENDING}),
    # Pending tasks may be due later.
    "OLDEST_PENDING": (due.OLDEST_PENDING, {admission.IS_PENDING, OFFERED}),
    "GET": (read.GET, {admission.IS_DUE, NOT_PAUSED.removeprefix("NOT "), OFFERED}),
    "UNSERVED": (unserved.UNSERVED, {admission.IS_PENDING, NOT_PAUSED}),
}
"""Statements that ask which tasks may start now, and the pieces that each must contain."""


@pytest.mark.parametrize("name", ANSWERS)
def test_each_statement_that_asks_what_may_start_uses_the_same_text(name: str) -> None:
    """
    Each statement contains the text of `admission`.
    """
    statement, pieces = ANSWERS[name]

    assert set() == {piece for piece in pieces if piece not in statement}


@pytest.mark.parametrize(
    "spelled_out",
    [
        r"t\.run_at <= now\(\)(?! -)",
        r"t\.run_at > now\(\)",
        r"expires_at > now\(\)",
        r"\bt\.name = ANY",
        r"q\.paused_at IS NOT NULL",
        r"queued_at IS (NOT )?NULL AND t\.lease_id IS NULL",
    ],
)
def test_no_other_file_spells_out_what_may_start(spelled_out: str) -> None:
    """
    No other file repeats the rule, since the next change to it would miss that file.
    """
    found = [path.name for path in SOURCES if re.search(spelled_out, path.read_text())]

    assert set(found) <= {"admission.py"}


def test_every_statement_that_ends_tasks_is_composed_in_one_place() -> None:
    """
    All five statements that end tasks are composed in one place, so none can miss what the end of a
    task triggers.
    """
    ends = re.compile(rf"SET state = '(?:{'|'.join(TERMINAL)})'")
    ending = {name for name, statement in STATEMENTS.items() if ends.search(statement)}
    spelled_out = [path.name for path in SOURCES if ends.search(path.read_text())]

    assert {
        "settle.SETTLE_COMPLETED",
        "settle.SETTLE_FAILED",
        "settle.SETTLE_CANCELLED",
        "steer.CANCEL_WAITING",
        "upkeep.EXPIRE",
    } == ending
    assert [] == spelled_out
