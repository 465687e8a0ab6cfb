"""
What handlers did, in their own words: a file that every attempt appends to.

It is written past AsyncFlow, so it also tells of executions that AsyncFlow does not count.
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
    One line.

    Attributes:
        time: Of the monotonic clock, which all processes of a machine share.
        what: `start` or `end`.
        pid: Of the process that the handler ran in.
    """

    time: float
    what: str
    task_id: str
    attempt: int
    pid: int


class Journal:
    """
    The file, from the side of the test.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        file.touch()

    def entries(self, task_id: str | None = None, *, what: str | None = None) -> list[Entry]:
        """
        What was written so far, in the order of writing.
        """
        # A line that is just being written may be seen in part.
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
