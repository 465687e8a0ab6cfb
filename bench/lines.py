"""
The raw lines of a run, and the queries of the report.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """
    The repetitions of one figure.
    """

    median: float
    lowest: float
    highest: float
    repetitions: int


class Lines:
    """
    All measurements of one run.

    Attributes:
        environment: The machine, the versions and the options of the run, as it began.
        commands: The arguments of each command that measured a part of the run.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        everything = list(lines)
        self.environment: Mapping[str, Any] = next(
            (line for line in everything if line["scenario"] == "environment"), {}
        )
        self.commands: Sequence[Sequence[str]] = [
            line["arguments"] for line in everything if line["scenario"] == "environment"
        ]
        self._lines = [line for line in everything if line["scenario"] != "environment"]

    def of(self, scenario: str, system: str, **case: Any) -> list[Mapping[str, Any]]:
        """
        The successful measurements of one system, in the cases with these values.
        """
        return [
            line
            for line in self._lines
            if (line["scenario"], line["system"]) == (scenario, system)
            and "error" not in line
            and case.items() <= line["case"].items()
        ]

    def has(self, scenario: str, system: str, case: Mapping[str, Any], repetition: int) -> bool:
        """
        Whether exactly this measurement was made and succeeded.
        """
        return any(
            line["repetition"] == repetition and line["case"] == case
            for line in self.of(scenario, system, **case)
        )

    def spread(self, field: str, scenario: str, system: str, **case: Any) -> Spread | None:
        """
        The repetitions of one field, `outer.inner` for a nested one; None if there are none.
        """
        values = [_value(line, field) for line in self.of(scenario, system, **case)]
        found = [float(value) for value in values if value is not None]
        if not found:
            return None
        return Spread(statistics.median(found), min(found), max(found), len(found))

    def median(self, field: str, scenario: str, system: str, **case: Any) -> float | None:
        """
        The median of one field, None if it was not measured.
        """
        spread = self.spread(field, scenario, system, **case)
        return spread.median if spread else None

    def errors(self) -> list[Mapping[str, Any]]:
        """
        The measurements that failed and were not repeated successfully later.
        """
        return [
            line
            for line in self._lines
            if "error" in line
            and not self.has(line["scenario"], line["system"], line["case"], line["repetition"])
        ]

    def loads(self) -> list[float]:
        """
        The machine's load average before each measurement.
        """
        return [line["load_before"] for line in self._lines]


def read_lines(file: Path) -> Lines:
    """
    Read the raw lines of a run, finished or not; none if it has not started.
    """
    text = file.read_text() if file.exists() else ""
    return Lines(json.loads(line) for line in text.splitlines())


def _value(line: Mapping[str, Any], field: str) -> Any:
    value: Any = line
    for part in field.split("."):
        value = value.get(part) if value is not None else None
    return value
