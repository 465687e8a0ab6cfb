"""
Finds tasks whose hints RabbitMQ has lost: a queue was purged or deleted, or a disk died.

Each round compares how many tasks have been queued for a while with how many hints the ready
messages can hold. The surplus has no message any more and goes back to pending. A wrong guess
sends a hint twice, which a claim ignores.
"""

from __future__ import annotations

from asyncflow.store import hints
from asyncflow.store.database import Executor
from asyncflow.store.hints import OpenQueue
from asyncflow.telemetry import events
from asyncflow.transport.rabbitmq.message import PACK_MAX

BATCH = 5_000


class LargestPack:
    """
    The most hints that one message of a queue can hold.

    Packs that have waited for longer than `remembered_seconds` no longer count. If that is wrong,
    hints are sent twice; counting them for longer would hide a loss for as long as a backlog lasts.
    """

    def __init__(self, *, remembered_seconds: float, now: float) -> None:
        self._remembered_seconds = remembered_seconds
        # The sizes of a former leader's packs are unknown.
        self._hints = PACK_MAX
        self._sent_at = now

    def sent(self, hints: int, *, now: float) -> None:
        """
        Take a message with this many hints into account.
        """
        if hints >= self.hints(now=now):
            self._hints, self._sent_at = hints, now

    def forget(self) -> None:
        """
        Forget all packs: no task has a hint in RabbitMQ.
        """
        self._hints = 1

    def hints(self, *, now: float) -> int:
        """
        The size of the largest pack that counts, 1 if there is none.
        """
        return self._hints if now - self._sent_at <= self._remembered_seconds else 1


async def unqueue_lost(
    db: Executor, queue: OpenQueue, *, ready: int, older_than_seconds: float
) -> None:
    """
    Put queued tasks whose hints must be lost back to pending.

    Args:
        ready: How many hints RabbitMQ holds at most that no worker has received yet.
        older_than_seconds: How long a hint may be on its way to a worker.
    """
    if queue.queued <= ready:
        return
    count = await hints.unqueue_lost(
        db,
        queue=queue.name,
        older_than_seconds=older_than_seconds,
        ready=ready,
        limit=BATCH,
        since=queue.queued_since,
    )
    if count:
        events.hints_lost(queue=queue.name, count=count)
