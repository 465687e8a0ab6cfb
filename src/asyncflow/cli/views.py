"""
Tasks as a person at a terminal wants to see them.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncflow.store.tasks import Attempt, Page, Task

STYLES = {
    "COMPLETED": "green",
    "FAILED": "red",
    "CANCELLED": "yellow",
    "RETRYING": "magenta",
    "RUNNING": "cyan",
}

TEXT_LENGTH_MAX = 2_000
"""Longer payloads and results are cut; `--json` has all of them, in characters."""


def print_page(page: Page) -> None:
    """
    Print one line per task, and how to see the rest.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if not page.tasks:
        console.print("No such tasks.")
        return
    name_length = max(len("NAME"), *(len(task.name) for task in page.tasks))
    queue_length = max(len("QUEUE"), *(len(task.queue) for task in page.tasks))
    line = f"{{:36}}  {{:{name_length}}}  {{:9}}  {{:{queue_length}}}  {{:>7}}  {{}}".format
    console.print(line("ID", "NAME", "STATUS", "QUEUE", "ATTEMPT", "CREATED"), style="bold")
    for task in page.tasks:
        text = Text(
            line(
                str(task.id),
                task.name,
                task.status,
                task.queue,
                task.attempt,
                _time(task.created_at),
            )
        )
        text.highlight_words([task.status], STYLES.get(task.status, ""))
        console.print(text)
    if page.next_cursor:
        console.print(f"More with --cursor={page.next_cursor}", style="dim")


def print_task(task: Task) -> None:
    """
    Print everything about one task that is known.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in _facts(task):
        table.add_row(label, value if isinstance(value, Text) else Text(_printable(value)))
    Console().print(table)


def _facts(task: Task) -> Iterator[tuple[str, str | Text]]:
    yield "task", str(task.id)
    yield "name", task.name
    yield "status", _status(task.status)
    if task.waiting_for:
        yield "waiting for", task.waiting_for
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
    yield "payload", task.payload or "{}"
    if task.result is not None:
        yield "result", task.result


def _status(status: str) -> Text:
    return Text(status, style=STYLES.get(status, ""))


def _attempt(attempt: Attempt) -> Text:
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
    # What tasks say must not steer the terminal of whoever looks at them.
    shown = "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return shown if len(shown) <= TEXT_LENGTH_MAX else shown[:TEXT_LENGTH_MAX] + " …"
