"""
What one process records, as a file of JSON lines.

Each line is one `write` to a file opened for appending, so a killed process leaves complete lines,
and several processes can share a file. Nothing here uses the system under test.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path


class History:
    """
    Appends to `folder`/`who`.jsonl.
    """

    def __init__(self, folder: Path, who: str) -> None:
        self._file = os.open(folder / f"{who}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, what: str, **fields: object) -> None:
        """
        Add one line; `t` is the monotonic clock in nanoseconds.
        """
        self.write_all(what, [fields])

    def write_all(self, what: str, lines: Iterable[Mapping[str, object]]) -> None:
        """
        Add lines of one kind with the same time.
        """
        head = {"what": what, "t": time.monotonic_ns()}
        text = "".join(json.dumps({**head, **fields}) + "\n" for fields in lines)
        os.write(self._file, text.encode())

    def close(self) -> None:
        """
        Close the file.
        """
        os.close(self._file)
