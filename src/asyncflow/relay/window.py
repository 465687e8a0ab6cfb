"""
How many hints of one queue RabbitMQ should hold, as a pure state machine.

A window is short so that priority and pause take effect immediately: what is inside RabbitMQ has
been decided. Each round observes how many hints are left and moves the window:

    size    It starts at a multiple of the workers' slots, doubles while workers all but empty it
            between two rounds without a rest, and shrinks while more than half of it is left.
    pack    Only a window that has grown, which is to say only for short tasks, is sent in packs of
            several hints per message. Slow tasks travel one by one, so that workers share them
            evenly.
    rest    The next round is due when between a quarter and a half of the window is used up. The
            rest before it doubles or halves until that is so.

Times are seconds of one monotonic clock, passed in by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from asyncflow.transport.rabbitmq.message import PACK_MAX

SIZE_PER_SLOT = 2
SIZE_MIN, SIZE_MAX = 16, 1_500

DRAINED = 1 / 8
"""A window with no more than this part of it left was too small, or observed too late."""

REST_SECONDS_MIN, REST_SECONDS_MAX = 0.01, 0.5

HALVED_SECONDS = 60.0
"""How long a window is kept as small as a queue's limits ask."""


@dataclass(frozen=True, slots=True)
class Window:
    """
    The window of one queue after a round.

    Attributes:
        room: How many hints to send now.
        size: How many hints RabbitMQ should hold ready.
        floor: The least size that keeps every slot busy.
        rest_seconds: How soon the next round is due while more tasks wait than were sent.
        rest_seconds_max: The longest rest.
        is_full: Whether the last send filled it; otherwise the tasks ran out.
        observed_at: When the last round was.
        size_max: The largest size until `halved_until`.
    """

    room: int = 0
    size: int = 0
    floor: int = SIZE_MIN
    rest_seconds: float = REST_SECONDS_MIN
    rest_seconds_max: float = REST_SECONDS_MAX
    is_full: bool = False
    observed_at: float = -math.inf
    size_max: int = SIZE_MAX
    halved_until: float = -math.inf

    @property
    def pack(self) -> int:
        """
        How many hints to put into one message: few enough that every slot gets messages.
        """
        return max(1, min(PACK_MAX, self.size // self.floor))

    def observed(self, *, ready: int, slots: int, now: float) -> Window:
        """
        The window for this round.

        Args:
            ready: How many hints RabbitMQ holds that no worker has received yet.
            slots: How many attempts the queue's workers can run at the same time.
        """
        was_drained = self.is_full and ready <= self.size * DRAINED
        was_late = was_drained and self.rest_seconds > REST_SECONDS_MIN
        seen = replace(
            self,
            floor=max(SIZE_MIN, SIZE_PER_SLOT * slots),
            rest_seconds=REST_SECONDS_MIN if was_late else self.rest_seconds,
            observed_at=now,
        )
        sized = replace(seen, size=seen._next_size(ready, grows=was_drained and not was_late))
        room = max(0, sized.size - ready)
        rest_seconds = sized._next_rest_seconds(room, rested_seconds=now - self.observed_at)
        # A round costs the same for few hints as for many, so packs wait until many fit.
        is_worth_it = sized.pack == 1 or room >= sized.size // 2
        return replace(sized, room=room if is_worth_it else 0, rest_seconds=rest_seconds)

    def filled(self, *, sent: int) -> Window:
        """
        The window after `sent` of the hints that it had room for were sent.
        """
        return replace(self, is_full=sent >= self.room)

    def halved(self, *, now: float) -> Window:
        """
        The window at half its size for a while: RabbitMQ did not keep all that was sent.
        """
        size = min(self.size, self.size_max) if now < self.halved_until else self.size
        return replace(self, size_max=max(1, size // 2), halved_until=now + HALVED_SECONDS)

    def _next_size(self, ready: int, *, grows: bool) -> int:
        size = self.size
        if grows:
            size = min(SIZE_MAX, 2 * size)
        elif ready > size // 2:
            size -= size // 16
        size = max(self.floor, size)
        return min(size, self.size_max) if self.observed_at < self.halved_until else size

    def _next_rest_seconds(self, room: int, *, rested_seconds: float) -> float:
        if self.pack > 1:
            return REST_SECONDS_MIN
        if room > self.size // 2:
            return max(REST_SECONDS_MIN, self.rest_seconds / 2)
        # A round that came early, by a wake-up or for another queue, proves nothing by little use.
        if room < self.size // 4 and rested_seconds >= self.rest_seconds:
            return min(self.rest_seconds_max, 2 * self.rest_seconds)
        return self.rest_seconds
