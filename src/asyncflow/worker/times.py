"""
How long a worker waits, for each thing it waits for.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Times:
    """
    In seconds.

    Attributes:
        shutdown_grace: How long attempts may take to finish once the worker stops.
        release: How long the last settles may take to be written after that.
        stall: How long the event loop may stand still, or stuck handlers may hold every slot,
            before the process ends itself.
        tick: The time between two checks of waiting claims, progress and stuck handlers.
        claim_wait_max: A claim that found no slot for this long goes back: another worker may
            have one.
        settle_retry: Bounds of the random wait between tries to settle, so that workers do not
            return in step.
        heartbeat_retry: The wait before a heartbeat tries a new connection.
        goodbye: How long a worker that stops waits for PostgreSQL to record that.
    """

    shutdown_grace: float = 30.0
    release: float = 10.0
    stall: float = 60.0
    tick: float = 0.5
    claim_wait_max: float = 1.0
    settle_retry: tuple[float, float] = (0.1, 0.6)
    heartbeat_retry: float = 0.3
    goodbye: float = 5.0
