"""
Reads the table in `cases.txt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("cases.txt")
ENGINES = ("postgres", "rabbitmq")
ACTIONS = ("exit", "raise", "freeze", "cut-postgres", "cut-broker")

GONE = "gone"
"""Used in place of a state: the task was pruned."""


class Case(NamedTuple):
    """
    One failure, and what must hold after it.

    Attributes:
        state: The final state of every task.
        starts_min, starts_max: Bounds on how often a task's handler starts.
        seconds: Maximum time from the failure until the tasks reach that state.
    """

    engine: str
    point: str
    action: str
    state: str
    starts_min: int
    starts_max: int
    seconds: float

    @property
    def name(self) -> str:
        """
        The case's name in tests and reports.
        """
        return f"{self.engine}-{self.point}-{self.action}"


def read_cases(text: str) -> list[Case]:
    """
    All cases of a table, in its order.
    """
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    return [case for fields in lines if fields for case in _read_line(*fields)]


def _read_line(
    point: str, actions: str, engine: str, state: str, starts: str, seconds: str
) -> list[Case]:
    least, _, most = starts.partition("-")
    return [
        Case(each, point, action, state, int(least), int(most or least), float(seconds))
        for each in (ENGINES if engine == "both" else (engine,))
        for action in actions.split(",")
    ]


CASES = read_cases(TABLE.read_text())
