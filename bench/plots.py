"""
The report's plots, as SVG that is reproducible from the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from bench.entrants import ENTRANTS, Entrant
from bench.lines import Lines, Spread

OURS, PEER = ("#1f6feb", "#79b8ff"), ("#57606a", "#afb8c1")

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "asyncflow",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def bars(
    file: Path,
    lines: Lines,
    *,
    field: str,
    scenario: str,
    cases: Sequence[tuple[str, Callable[[Entrant], dict[str, Any]]]],
    label: str,
    logarithmic: bool = False,
) -> bool:
    """
    Draw horizontal bars, a group per system and a bar per case; False if there is nothing to show.
    """
    rows = [
        (
            entrant,
            [lines.spread(field, scenario, entrant.key, **case(entrant)) for _, case in cases],
        )
        for entrant in ENTRANTS.values()
    ]
    rows = [(entrant, spreads) for entrant, spreads in rows if any(spreads)]
    if not rows:
        return False
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 0.6 + 0.26 * len(rows) * len(cases)))
        for index, (entrant, spreads) in enumerate(rows):
            for number, spread in enumerate(spreads):
                if spread is not None:
                    _bar(axes, index, number, len(cases), entrant, spread)
        axes.set_yticks(range(len(rows)), [entrant.title for entrant, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel(label)
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
        if len(cases) > 1:
            handles = [Rectangle((0, 0), 1, 1, color=PEER[n % 2]) for n in range(len(cases))]
            axes.legend(handles, [name for name, _ in cases], frameon=False)
        _save(figure, file)
    return True


def _bar(axes: Axes, index: int, number: int, count: int, entrant: Entrant, spread: Spread) -> None:
    height = 0.8 / count
    place = index - 0.4 + height * (number + 0.5)
    shades = OURS if entrant.is_ours else PEER
    error = [[spread.median - spread.lowest], [spread.highest - spread.median]]
    axes.barh(place, spread.median, height * 0.9, color=shades[number % 2])
    axes.errorbar(spread.median, place, xerr=error, color="black", linewidth=0.8)
    figure = f"{spread.median:,.0f}" if spread.median >= 100 else f"{spread.median:.2f}"
    axes.annotate(
        figure, (spread.highest, place), xytext=(4, 0), textcoords="offset points", va="center"
    )


def waiting(file: Path, lines: Lines) -> bool:
    """
    Plot tasks per second over the number of workers, with the ideal line.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.5, 3))
        drawn = False
        for entrant, marker in (
            (ENTRANTS["asyncflow"], "o"),
            (ENTRANTS["asyncflow-rabbitmq"], "x"),
        ):
            points = [
                (workers, lines.median("per_second", "waiting", entrant.key, workers=workers))
                for workers in (1, 3, 5)
            ]
            found = [(workers, rate) for workers, rate in points if rate is not None]
            if found:
                drawn = True
                axes.plot(*zip(*found, strict=True), marker, color=OURS[0], label=entrant.title)
        ideal = lines.median("ideal_per_second", "waiting", "asyncflow", workers=1)
        if ideal is not None:
            axes.plot([0, 5], [0, 5 * ideal], color=PEER[1], zorder=0, label="every slot in use")
        axes.set_xlabel("worker processes")
        axes.set_ylabel("tasks per second")
        axes.legend(frameon=False)
        _save(figure, file)
    return drawn


def sustained(file: Path, samples: Sequence[dict[str, Any]]) -> None:
    """
    Plot latency, dead tuples and sizes over time.
    """
    seconds = [sample["seconds"] for sample in samples]
    with plt.rc_context(STYLE):
        figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 4.5), sharex=True)
        for field in ("p50_ms", "p99_ms"):
            values = [sample.get(field) for sample in samples]
            above.plot(seconds, values, label=field.removesuffix("_ms"))
        above.set_ylabel("latency, ms")
        above.set_yscale("log")
        above.legend(frameon=False)
        below.plot(seconds, [sample["dead"] for sample in samples], label="dead tuples")
        below.set_ylabel("dead tuples")
        sizes = below.twinx()
        live = [(s["live_table_bytes"] + s["live_index_bytes"]) / 2**20 for s in samples]
        sizes.plot(seconds, live, color=PEER[0], linestyle="--")
        sizes.set_ylabel("live table and indexes, MiB (dashed)")
        below.set_xlabel("seconds")
        _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
