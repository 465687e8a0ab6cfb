"""
What AsyncFlow keeps in RabbitMQ: one quorum queue per task queue, and a place for messages
that are not ours to read.

Declaring is idempotent and happens at every connect and at every round of the relay, so a
queue that somebody deleted is back within a second. Only what can never change is an
argument of the queue; limits and timeouts belong into policies (a changed argument would be
refused with 406 for as long as the old queue exists).
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from asyncpg.pgproto import pgproto

from asyncflow.transport.amqp import Channel, QueueCounts
from asyncflow.transport.amqp.channel import Arguments

UNREADABLE = "asyncflow.unreadable"
"""Exchange and queue for messages that are not task ids, for a person to look at."""

TASK_QUEUE_ARGUMENTS: Arguments = {
    "x-queue-type": "quorum",
    "x-dead-letter-exchange": UNREADABLE,
    # Hints are given back whenever a worker stops or has no slot; that must not count
    # towards RabbitMQ's default limit of 20, after which it would drop them.
    "x-delivery-limit": -1,
}

PACK_MAX = 50
"""
Most task ids in one message. What a message costs RabbitMQ and both ends is shared by so many.
"""

_BODY_BYTES_MAX = PACK_MAX * len("01a20cb2-c821-712a-9253-242be15a5023\n") - 1

UNREADABLE_ARGUMENTS: Arguments = {"x-queue-type": "quorum", "x-max-length": 10_000}


def broker_queue(queue: str) -> str:
    """
    The name in RabbitMQ of a task queue.
    """
    return f"asyncflow.tasks.{queue}"


async def declare_unreadable(channel: Channel) -> None:
    """
    Make the place for unreadable messages exist.
    """
    await channel.declare_exchange(UNREADABLE, kind="fanout")
    await channel.declare_queue(UNREADABLE, arguments=UNREADABLE_ARGUMENTS)
    await channel.bind_queue(UNREADABLE, exchange=UNREADABLE, routing_key="")


async def declare_task_queue(channel: Channel, queue: str) -> QueueCounts:
    """
    Make a task queue exist; return what it holds.
    """
    return await channel.declare_queue(broker_queue(queue), arguments=TASK_QUEUE_ARGUMENTS)


def encode_hints(task_ids: Sequence[UUID]) -> bytes:
    """
    The body of a message: the ids as text, a line each, so that a person can read it.

    Args:
        task_ids: 1 to `PACK_MAX` of them.
    """
    return "\n".join(map(str, task_ids)).encode()


def decode_hints(body: bytes | None) -> list[UUID] | None:
    """
    The task ids in a body, or None if it is anything else than 1 to `PACK_MAX` lines of one.

    One bad line spoils the message: a person shall see it as it came, and should an id beside
    it be a task's, the relay finds out that its hint is gone.
    """
    if body is None or len(body) > _BODY_BYTES_MAX:
        return None
    try:
        lines = body.decode("ascii").split("\n")
        if {len(line) for line in lines} != {36}:
            return None
        # PostgreSQL's client has a UUID of its own that is made eight times as fast.
        return [pgproto.UUID(line) for line in lines]
    except ValueError:
        return None
