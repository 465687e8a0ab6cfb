"""
What AsyncFlow keeps in RabbitMQ, every name beginning with a prefix, `asyncflow` unless set:

    asyncflow.tasks.<queue>    a quorum queue per task queue
    asyncflow.unreadable       for messages that are not ours to read, and for a person to look at
    asyncflow.dropped          for hints that a policy took out of a task queue: sent again
    asyncflow.installation     says whose names these are

A message that leaves a task queue in any other way than by an ack goes to the exchange
`asyncflow.unreadable`, and from there, sorted by the reason that RabbitMQ gives, into one of the
two queues.

Declaring is idempotent and happens at every connect and at every round of the relay, so a
queue that somebody deleted is back within a second. Only what can never change is an
argument of the queue; limits and timeouts belong into policies (a changed argument would be
refused with 406 for as long as the old queue exists).

Two installations that shared these names would take each other's hints for those of tasks that
are gone. So the first one declares a queue with its identity as an argument, and the declaration
of another is refused. The queue vanishes when nobody has used it for `OWNED_SECONDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from uuid import UUID

from asyncpg.pgproto import pgproto

from asyncflow.transport.amqp import Channel, QueueCounts
from asyncflow.transport.amqp.channel import Arguments

PREFIX = "asyncflow"

OWNED_SECONDS = 600
"""Longer than a deployment, so that nobody moves in meanwhile; see docs/internals/decisions.md."""

DROPPED_REASONS = ("expired", "maxlen", "delivery_limit")
"""Why RabbitMQ takes messages out of a queue by itself, as its headers say."""

REJECTED = "rejected"
"""The reason it gives for what a worker could not read."""

PACK_MAX = 50
"""
Most task ids in one message. What a message costs RabbitMQ and both ends is shared by so many.
"""

_BODY_BYTES_MAX = PACK_MAX * len("01a20cb2-c821-712a-9253-242be15a5023\n") - 1

_ASIDE_ARGUMENTS: Arguments = {"x-queue-type": "quorum", "x-max-length": 10_000}


def broker_queue(queue: str, *, prefix: str = PREFIX) -> str:
    """
    The name in RabbitMQ of a task queue.
    """
    return f"{prefix}.tasks.{queue}"


def unreadable(prefix: str = PREFIX) -> str:
    """
    The exchange of all dead letters, and the queue of those that a person should look at.
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
    Make the places for unreadable messages and for dropped hints exist.
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
    Make a task queue exist; return what it holds.
    """
    arguments: Arguments = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": unreadable(prefix),
        # Hints are given back whenever a worker stops or has no slot; that must not count
        # towards RabbitMQ's default limit of 20, after which it would drop them.
        "x-delivery-limit": -1,
    }
    return await channel.declare_queue(broker_queue(queue, prefix=prefix), arguments=arguments)


async def own(
    channel: Channel,
    *,
    installation: str,
    prefix: str = PREFIX,
    on_lost: Callable[[], None],
) -> None:
    """
    Declare whose names these are, and keep it known for as long as the channel is open.

    Args:
        on_lost: Called when the declaration was deleted, and the next one to declare it owns the
            names: begin anew.

    Raises:
        ChannelClosed: 406: they are another installation's; `diagnosis` names it.
    """
    arguments: Arguments = {
        "x-queue-type": "quorum",
        "x-expires": OWNED_SECONDS * 1_000,
        "x-dead-letter-exchange": unreadable(prefix),
        # Of all arguments that RabbitMQ compares, the one that may hold any text.
        "x-dead-letter-routing-key": installation,
    }
    queue = marker_queue(prefix)
    await channel.declare_queue(queue, arguments=arguments)
    await channel.consume(
        queue,
        prefetch=1,
        # Nobody has anything to say there.
        on_deliveries=lambda deliveries: channel.ack(deliveries[0].tag),
        on_cancelled=on_lost,
    )


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
