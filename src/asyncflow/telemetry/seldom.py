"""
Events that may happen thousands of times a minute, and are worth one line in it.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable


class Seldom:
    """
    Counts what is not said yet, by key; the first of a key is said immediately.

    Args:
        seconds: How long nothing more is said of a key then.
    """

    def __init__(self, *, seconds: float = 60.0) -> None:
        self._seconds = seconds
        self._said_at: dict[Hashable, float] = {}
        self._unsaid: Counter[Hashable] = Counter()

    def count(self, key: Hashable, number: int) -> int:
        """
        Add `number`; return how many to speak of now, 0 if it is too soon.
        """
        self._unsaid[key] += number
        now = time.monotonic()
        if now < self._said_at.get(key, -math.inf) + self._seconds:
            return 0
        self._said_at[key] = now
        return self._unsaid.pop(key, 0)
