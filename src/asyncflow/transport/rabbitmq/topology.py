"""
What AsyncFlow declares in RabbitMQ, every name beginning with a prefix, `asyncflow` by default:

    asyncflow.tasks.<queue>    a quorum queue per task queue
    asyncflow.unreadable       messages that are not ours to read, for a person to inspect
    asyncflow.dropped          hints that a policy took out of a task queue: sent again
    asyncflow.installation     says whose names these are; see `ownership`

A message that leaves a task queue other than by an ack goes to the exchange `asyncflow.unreadable`,
and from there, by the reason that RabbitMQ gives, to one of the two queues.

Declaring is idempotent. It happens at every connect and in every round of the relay, so a deleted
queue is back within a second. Only what never changes is an argument of a queue; limits and
timeouts belong in policies (a changed argument would be refused with 406 for as long as the old
queue exists).
"""

from __future__ import annotations

from asyncflow.transport.amqp import Channel, QueueCounts
from asyncflow.transport.amqp.channel import Arguments

PREFIX = "asyncflow"

DROPPED_REASONS = ("expired", "maxlen", "delivery_limit")
"""Why RabbitMQ itself takes messages out of a queue, as its headers say."""

REJECTED = "rejected"
"""The reason it gives for a message that a worker could not read."""

_ASIDE_ARGUMENTS: Arguments = {"x-queue-type": "quorum", "x-max-length": 10_000}


def broker_queue(queue: str, *, prefix: str = PREFIX) -> str:
    """
    The name in RabbitMQ of a task queue.
    """
    return f"{prefix}.tasks.{queue}"


def unreadable(prefix: str = PREFIX) -> str:
    """
    The exchange of all dead letters, and the queue of those that a person should inspect.
    """
    return f"{prefix}.unreadable"


def dropped(prefix: str = PREFIX) -> str:
    """
    The exchange that sorts dead letters, and the queue of those that RabbitMQ dropped.
    """
    return f"{prefix}.dropped"


def marker_queue(prefix: str = PREFIX) -> str:
    """
    The queue that says whose names these are.
    """
    return f"{prefix}.installation"


async def declare_dead_letters(channel: Channel, *, prefix: str = PREFIX) -> None:
    """
    Make the exchanges and queues of unreadable messages and dropped hints exist.
    """
    entrance, sorting = unreadable(prefix), dropped(prefix)
    await channel.declare_exchange(entrance, kind="fanout")
    await channel.declare_exchange(sorting, kind="headers")
    await channel.bind_exchange(sorting, source=entrance, routing_key="")
    for queue, reasons in ((entrance, (REJECTED,)), (sorting, DROPPED_REASONS)):
        await channel.declare_queue(queue, arguments=_ASIDE_ARGUMENTS)
        for reason in reasons:
            arguments = {"x-match": "any-with-x", "x-last-death-reason": reason}
            await channel.bind_queue(queue, exchange=sorting, routing_key="", arguments=arguments)


async def declare_task_queue(channel: Channel, queue: str, *, prefix: str = PREFIX) -> QueueCounts:
    """
    Make a task queue exist, and count what it holds.
    """
    arguments: Arguments = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": unreadable(prefix),
        # Hints are given back whenever a worker stops or has no slot; that must not count
        # towards RabbitMQ's default limit of 20, after which it would drop them.
        "x-delivery-limit": -1,
    }
    return await channel.declare_queue(broker_queue(queue, prefix=prefix), arguments=arguments)
