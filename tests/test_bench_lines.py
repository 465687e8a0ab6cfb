"""
How the benchmark suite reads its raw result lines. The measurements are not tested here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.lines import Lines, read_lines
from bench.targets import targets

CASE = {"workers": 1, "payload": "small"}
FAILED: dict[str, Any] = {"error": "TimeoutError()"}


def a_line(system: str, *, repetition: int = 1, **values: Any) -> dict[str, Any]:
    """
    A result line of the drain scenario.
    """
    return {
        "scenario": "drain",
        "system": system,
        "case": CASE,
        "repetition": repetition,
        "load_before": 0.5,
        **values,
    }


def test_a_run_that_was_cut_short_knows_what_it_has(tmp_path: Path) -> None:
    """
    A continued run only repeats measurements that are missing or failed.
    """
    raw = tmp_path / "raw.jsonl"
    written = [a_line("asyncflow", per_second=2.0), a_line("asyncflow", repetition=2, **FAILED)]
    raw.write_text("".join(json.dumps(line) + "\n" for line in written))

    lines = read_lines(raw)

    assert lines.has("drain", "asyncflow", CASE, 1)
    assert not lines.has("drain", "asyncflow", CASE, 2)
    assert not lines.has("drain", "asyncflow", {**CASE, "workers": 2}, 1)
    assert not lines.has("drain", "naive", CASE, 1)


def test_a_run_that_has_not_begun_has_nothing(tmp_path: Path) -> None:
    """
    Without a file of raw lines there are no results, and no error.
    """
    lines = read_lines(tmp_path / "raw.jsonl")

    assert ({}, []) == (lines.environment, lines.loads())


def test_a_failure_with_a_later_success_is_not_reported() -> None:
    """
    A failure is reported only if no later success replaces it.
    """
    lines = Lines(
        [
            a_line("asyncflow", **FAILED),
            a_line("naive", **FAILED),
            a_line("asyncflow", per_second=2.0),
        ]
    )

    assert ["naive"] == [line["system"] for line in lines.errors()]


def test_every_target_is_listed_whatever_was_measured() -> None:
    """
    Every target is listed, with a verdict or as not measured.
    """
    nothing = list(targets(Lines([])))
    something = Lines(
        [a_line("asyncflow", per_second=1.2, repetition=n) for n in (1, 2, 3)]
        + [a_line("pgqueuer", per_second=1.0)]
    )
    verdicts = {target.what: target.verdict for target in targets(something)}

    assert {"not measured"} == {target.verdict for target in nothing}
    assert len(nothing) == len(verdicts)
    assert "met" == verdicts["drain, PostgreSQL alone, 1 worker: rate against pgqueuer"]
