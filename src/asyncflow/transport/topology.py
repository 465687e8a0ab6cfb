"""
What AsyncFlow keeps in RabbitMQ: one quorum queue per task queue, and a place for messages
that are not ours to read.

Declaring is idempotent and happens at every connect and at every round of the relay, so a
queue that somebody deleted is back within a second. Only what can never change is an
argument of the queue; limits and timeouts belong into policies (a changed argument would be
refused with 406 for as long as the old queue exists).
"""

from __future__ import annotations

from uuid import UUID

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


def encode_hint(task_id: UUID) -> bytes:
    """
    The body of a hint: the task's id as text, so that a person can read it, and nothing else.
    """
    return str(task_id).encode()


def decode_hint(body: bytes | None) -> UUID | None:
    """
    The task id in a body, or None if it is not exactly one.
    """
    if body is None or len(body) != 36:
        return None
    try:
        return UUID(body.decode("ascii"))
    except ValueError:
        return None
