"""
Why hints cannot be sent now, as the relay tells it to people.
"""

from __future__ import annotations

import math

from asyncflow.relay.window import HALVED_SECONDS

CONNECTION = ""
"""Stands for the connection where a queue is expected."""


class Troubles:
    """
    What is wrong with the connection and with single queues.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}
        self._limit = ""
        self._limited_at = -math.inf

    def begin(self, queue: str, reason: str) -> None:
        """
        Note that no hints can be sent to `queue`.
        """
        self._reasons[queue] = reason

    def end(self, queue: str) -> None:
        """
        Note that hints can be sent to `queue`.
        """
        self._reasons.pop(queue, None)

    def limit(self, reason: str, *, now: float) -> None:
        """
        Note that a limit of some queue took effect.
        """
        self._limit, self._limited_at = reason, now

    def told(self, *, now: float) -> str | None:
        """
        The most important trouble there is now, or None.
        """
        if self._reasons:
            return next(iter(self._reasons.values()))
        # A limit is mentioned for as long as it keeps a window small.
        return self._limit if now <= self._limited_at + HALVED_SECONDS else None
