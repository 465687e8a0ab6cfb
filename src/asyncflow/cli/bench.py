"""
`asyncflow bench`: measures how fast a deployment is.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from asyncflow.cli.measuring import Measurement, Rate
    from asyncflow.settings import Settings
    from asyncflow.store.measurements import Capacity


@click.command()
@click.option(
    "--tasks",
    "count",
    type=click.IntRange(100, 1_000_000),
    default=10_000,
    show_default=True,
    help="Number of tasks, submitted twice.",
)
@click.option(
    "--queue", metavar="NAME", default="default", show_default=True, help="Queue of the tasks."
)
@click.option(
    "--payload-bytes",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Size of each payload.",
)
@click.option("--keep", is_flag=True, help="Keep the tasks afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def bench(count: int, queue: str, payload_bytes: int, keep: bool, as_json: bool) -> None:
    """
    Measure this deployment with tasks that do nothing.

    Needs running workers and removes its tasks afterwards. It slows other tasks down, and they
    slow it down.
    """
    from asyncflow.domain.policy import NAME_PATTERN
    from asyncflow.settings import load_settings

    settings = load_settings()
    if not NAME_PATTERN.fullmatch(queue):
        raise click.BadParameter(
            f"invalid queue name {queue!r}: 1 to 128 characters from A-Z a-z 0-9 . _ -"
        )
    if payload_bytes > settings.payload_bytes_max:
        raise click.BadParameter(
            f"at most {settings.payload_bytes_max} bytes, see ASYNCFLOW_PAYLOAD_BYTES_MAX",
            param_hint="--payload-bytes",
        )
    capacity, figures, removed = asyncio.run(
        _measured(settings, count=count, queue=queue, payload_bytes=payload_bytes, keep=keep)
    )
    if as_json:
        click.echo(json.dumps(_as_json(capacity, figures, removed)))
    else:
        click.echo("\n".join(_as_text(capacity, figures, removed)))


async def _measured(
    settings: Settings, *, count: int, queue: str, payload_bytes: int, keep: bool
) -> tuple[Capacity, Measurement, int]:
    from asyncflow.cli.database import opened
    from asyncflow.cli.measuring import Bench

    async with opened(settings, size=4) as db:
        bench = Bench(db, queue=queue, payload_bytes=payload_bytes)
        capacity = await bench.capacity()
        try:
            figures = await bench.measure(count)
        finally:
            # Also after Ctrl-C, which ends the measurement but not the loop.
            await bench.close()
            removed = 0 if keep else await bench.remove()
    return capacity, figures, removed


def _as_json(capacity: Capacity, figures: Measurement, removed: int) -> dict[str, Any]:
    latency = figures.latency
    return {
        "workers": capacity.workers,
        "slots": capacity.slots,
        "latency": {
            "tasks": latency.completed,
            "start_ms": _percentiles(latency.start_seconds),
            "finish_ms": _percentiles(latency.finish_seconds),
        },
        "one_by_one": _rounded(figures.one_by_one),
        "in_batches": _rounded(figures.in_batches),
        "removed": removed,
    }


def _percentiles(seconds: tuple[float, ...]) -> dict[str, float]:
    values = [round(1_000 * value, 3) for value in seconds]
    return dict(zip(("p50", "p95", "p99"), values, strict=True))


def _rounded(rate: Rate) -> dict[str, float]:
    return {name: round(value, 1) for name, value in asdict(rate).items()}


def _as_text(capacity: Capacity, figures: Measurement, removed: int) -> list[str]:
    from asyncflow.cli.measuring import BATCH_SIZE_MAX, CALLERS

    rates = {
        f"one by one, {CALLERS} callers": figures.one_by_one,
        f"in batches of up to {BATCH_SIZE_MAX}": figures.in_batches,
    }
    latencies = {
        "until it starts": figures.latency.start_seconds,
        "until it is finished": figures.latency.finish_seconds,
    }
    lines = [_setting(capacity), ""]
    lines.append(f"{'tasks per second':28}{'tasks':>10}{'submitted':>12}{'completed':>12}")
    for what, rate in rates.items():
        speeds = f"{rate.submitted_per_second:12,.0f}{rate.completed_per_second:12,.0f}"
        lines.append(f"{what:28}{rate.tasks:10,}{speeds}")
    lines += ["", f"{'one task, idle, ms':28}{'p50':>10}{'p95':>12}{'p99':>12}"]
    for what, seconds in latencies.items():
        p50, p95, p99 = (1_000 * value for value in seconds)
        lines.append(f"{what:28}{p50:10.1f}{p95:12.1f}{p99:12.1f}")
    unwell = sum(rate.tasks - rate.completed for rate in rates.values())
    if unwell:
        lines += [
            "",
            f"{unwell:,} tasks failed or were cancelled; run again with --keep to see them.",
        ]
    lines += ["", f"Removed {removed:,} tasks." if removed else "The tasks were kept."]
    return lines


def _setting(capacity: Capacity) -> str:
    workers = f"{capacity.workers} worker process{'es' if capacity.workers > 1 else ''}"
    beside = f", besides {capacity.unfinished:,} other tasks" if capacity.unfinished else ""
    return f"{workers}, {capacity.slots} slots{beside}"
