"""
Tasks, queues and workers as text for a person at a terminal.

A pipe or a file gets the same text: nothing is wrapped or cut to a width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from asyncflow.domain.task import AttemptRecord, Task
    from asyncflow.store.queues import Queue
    from asyncflow.store.read import Page
    from asyncflow.store.workers import Living

STYLES = {
    "COMPLETED": "green",
    "FAILED": "red",
    "CANCELLED": "yellow",
    "RETRYING": "magenta",
    "RUNNING": "cyan",
}

_TOLD = frozenset(
    "id name queue status state priority generation attempt failures max_attempts timeout_seconds "
    "created_at run_at expires_at queued_at started_at finished_at cancel_requested_at worker_id "
    "failure progress payload result waiting_for attempts".split()
)
"""Shown by `_facts` in its own words, or by the attempts. Other columns are shown as stored."""

TEXT_LENGTH_MAX = 2_000
"""In characters. Longer payloads and results are cut; `--json` has all of them."""


def print_page(page: Page) -> None:
    """
    Print one line per task, and how to get the next page.
    """
    if not page.tasks:
        _console().print("No such tasks.")
        return
    columns = ("ID", "NAME", "STATUS", "QUEUE", ">ATTEMPT", "CREATED")
    _print_table(
        columns,
        [(t.id, t.name, t.status, t.queue, t.attempt, _time(t.created_at)) for t in page.tasks],
    )
    if page.next_cursor:
        _console().print(f"More with --cursor={page.next_cursor}", style="dim")


def print_task(task: Task) -> None:
    """
    Print everything about one task that is known.
    """
    console = _console()
    facts = [(label, _text(value)) for label, value in _facts(task)]
    width = max(len(label) for label, _ in facts)
    for label, value in facts:
        # A traceback keeps its lines, aligned below one another.
        for number, line in enumerate(value.split("\n")):
            start = Text(f"{label if number == 0 else '':{width}}  ", style="dim")
            console.print(start.append_text(line))


def print_queues(queues: Sequence[Queue]) -> None:
    """
    Print one line per queue.
    """
    columns = ("QUEUE", ">WAITING", ">RUNNING", "OLDEST DUE", ">WORKERS", ">SLOTS", "")
    _print_table(
        columns,
        [
            (
                q.name,
                q.waiting,
                q.running,
                _time(q.oldest_due_at) if q.oldest_due_at else "-",
                q.workers,
                q.slots,
                f"paused since {_time(q.paused_at)}" if q.paused_at else "",
            )
            for q in queues
        ],
    )


def print_workers(workers: Sequence[Living]) -> None:
    """
    Print one line per worker, with a note on one whose heartbeat is overdue.
    """
    if not workers:
        _console().print("No live workers.")
        return
    columns = ("ID", "NAME", ">RUNNING", ">SLOTS", "QUEUES", "STARTED", ">SILENT", "")
    _print_table(
        columns,
        [
            (
                w.id,
                w.name,
                w.running,
                w.slots,
                ",".join(w.queues),
                _time(w.started_at),
                f"{w.silent_seconds:.1f} s",
                "dead or cut off; is maintenance running?" if w.is_overdue else "",
            )
            for w in workers
        ],
    )


def print_json(name: str, rows: Sequence[Any]) -> None:
    """
    Print dataclasses as `{name: [...]}`.
    """
    listed = {name: [dataclasses.asdict(row) for row in rows]}
    click.echo(json.dumps(listed, indent=2, ensure_ascii=False, default=_as_json))


def _as_json(value: object) -> str:
    from asyncflow.wire.fields import rfc3339

    return rfc3339(value) if isinstance(value, datetime) else str(value)


def _console() -> Console:
    return Console(highlight=False, markup=False, soft_wrap=True)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    # A column whose name begins with > is aligned to the right.
    names = [column.removeprefix(">") for column in columns]
    cells = [[_printable(str(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]

    def line(values: Sequence[str]) -> str:
        aligned = (
            value.rjust(width) if column.startswith(">") else value.ljust(width)
            for value, width, column in zip(values, widths, columns, strict=True)
        )
        return "  ".join(aligned).rstrip()

    console = _console()
    console.print(line(names), style="bold")
    for row in cells:
        text = Text(line(row))
        for status in STYLES.keys() & {*row}:
            text.highlight_words([status], STYLES[status])
        console.print(text)


def _facts(task: Task) -> Iterator[tuple[str, str | Text]]:
    yield "task", str(task.id)
    yield "name", task.name
    yield "status", _status(task.status)
    if task.waiting_for:
        yield "waiting for", task.waiting_for
    if task.cancel_requested_at and task.status == "RUNNING":
        requested = _time(task.cancel_requested_at)
        yield "cancel", f"requested {requested}; its worker asks the handler to stop"
    yield "queue", f"{task.queue}, priority {task.priority}"
    yield "created", _time(task.created_at)
    if task.run_at != task.created_at:
        yield "run at", _time(task.run_at)
    if task.expires_at:
        yield "expires", _time(task.expires_at)
    if task.progress:
        yield "progress", _progress(task.progress)
    for attempt in task.attempts:
        yield f"attempt {attempt.attempt}", _attempt(attempt)
    if task.failure:
        yield "error", task.failure.get("traceback") or task.failure["message"]
    for field in dataclasses.fields(task):
        if field.name not in _TOLD and (value := getattr(task, field.name)) is not None:
            yield field.name, _time(value) if isinstance(value, datetime) else str(value)
    yield "payload", task.payload or "{}"
    if task.result is not None:
        yield "result", task.result


def _text(value: str | Text) -> Text:
    return value if isinstance(value, Text) else Text(_printable(value))


def _status(status: str) -> Text:
    return Text(status, style=STYLES.get(status, ""))


def _attempt(attempt: AttemptRecord) -> Text:
    text = Text()
    text.append_text(_status(attempt.outcome.upper()))
    text.append(f" from {_time(attempt.started_at)}")
    if attempt.finished_at:
        seconds = (attempt.finished_at - attempt.started_at).total_seconds()
        text.append(f" for {seconds:.3g} s")
    if attempt.failure:
        text.append(f": {_printable(attempt.failure['kind'])}", style="dim")
    return text


def _progress(progress: dict[str, Any]) -> str:
    fraction, message = progress.get("fraction"), progress.get("message")
    share = "" if fraction is None else f"{fraction:.0%}"
    return " ".join(part for part in (share, message) if part)


def _time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _printable(text: str) -> str:
    # A task's text must not control the reader's terminal.
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return shown if len(shown) <= TEXT_LENGTH_MAX else shown[:TEXT_LENGTH_MAX] + " …"
