"""
How much memory a process and its descendants hold.
"""

from __future__ import annotations

from pathlib import Path


def memory_bytes(pid: int) -> int:
    """
    Resident memory of a process and its descendants; shared pages count once in each.
    """
    import psutil  # Most workers limit no memory and save this much of it: 1 MB.

    total = 0
    pending = [pid]
    while pending:
        each = pending.pop()
        try:
            total += psutil.Process(each).memory_info().rss
            pending += _child_pids(each)
        except psutil.Error:
            continue  # it ended meanwhile
    return total


def _child_pids(pid: int) -> list[int]:
    import psutil

    # psutil finds children by reading every process of the machine; Linux can list them.
    try:
        lists = list(Path(f"/proc/{pid}/task").glob("*/children"))
        if not lists:
            return [child.pid for child in psutil.Process(pid).children()]
        return [int(child) for each in lists for child in each.read_text().split()]
    except (OSError, psutil.Error):
        return []  # it ended meanwhile
