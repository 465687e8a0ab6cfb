"""
At most one log line a minute for events that may happen thousands of times in it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable


class Throttle:
    """
    Adds up events by key, for a line at most every `seconds`; the first event gets one immediately.
    """

    def __init__(self, *, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._logged_at: dict[Hashable, float] = {}
        self._unlogged: Counter[Hashable] = Counter()

    def add(self, key: Hashable, number: int) -> int:
        """
        Add events; return how many to log now, 0 if it is too soon for another line.
        """
        self._unlogged[key] += number
        now = time.monotonic()
        if now < self._logged_at.get(key, -math.inf) + self._seconds:
            return 0
        self._logged_at[key] = now
        return self._unlogged.pop(key, 0)
