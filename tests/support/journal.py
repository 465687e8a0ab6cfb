"""
What the handlers executed, as they recorded it: a file that every attempt appends to.

It is written independently of AsyncFlow, so it includes executions that AsyncFlow does not count.
The handlers' side is in `handlers`.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import NamedTuple

from tests.support.waiting import PATIENCE_SECONDS

POLL_SECONDS = 0.01


class Entry(NamedTuple):
    """
    One line of the journal.

    Attributes:
        time: The monotonic clock, which all processes of a machine share.
        what: `start` or `end`.
        pid: The id of the process in which the handler ran.
    """

    time: float
    what: str
    task_id: str
    attempt: int
    pid: int


class Journal:
    """
    The file, as read by the test.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.touch()

    def entries(self, task_id: str | None = None, *, what: str | None = None) -> list[Entry]:
        """
        The entries written so far, in order.
        """
        # The last line may be incomplete while it is being written.
        whole, _, _ = self.file.read_text().rpartition("\n")
        read = [_entry(line) for line in whole.splitlines()]
        return [
            entry
            for entry in read
            if task_id in (None, entry.task_id) and what in (None, entry.what)
        ]

    async def wait_for(
        self,
        what: str,
        task_id: str,
        *,
        attempt: int = 1,
        timeout_seconds: float = PATIENCE_SECONDS,
    ) -> Entry:
        """
        Wait until an attempt started or ended.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            for entry in self.entries(task_id, what=what):
                if entry.attempt == attempt:
                    return entry
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError(
            f"attempt {attempt} of {task_id} did not {what} within {timeout_seconds:g} s; "
            f"known: {self.entries(task_id)}"
        )


def _entry(line: str) -> Entry:
    at, what, task_id, attempt, pid = line.split()
    return Entry(float(at), what, task_id, int(attempt), int(pid))
