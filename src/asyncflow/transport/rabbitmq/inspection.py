"""
Checks whether RabbitMQ is fit for AsyncFlow, one finding per check, for `asyncflow doctor`.

Only AMQP is used, since the management plugin may be disabled or closed to us. Nothing is left
behind: permissions, quorum queues and limits are tried out on a queue that is deleted at the end,
and what others may have declared is compared only where it exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

from asyncflow.errors import InvalidSettings, TransportError
from asyncflow.findings import Finding, doubtful, fine, wrong
from asyncflow.transport.amqp import (
    BrokerTimeout,
    Channel,
    Connection,
    Message,
    PublishResult,
    connect,
)
from asyncflow.transport.rabbitmq.diagnosis import explained
from asyncflow.transport.rabbitmq.ownership import own
from asyncflow.transport.rabbitmq.topology import (
    PREFIX,
    broker_queue,
    declare_task_queue,
    marker_queue,
    unreadable,
)

MAJOR_MIN = 4
CALL_SECONDS = 5.0
PROBES = 20
"""About what the smallest window holds, so a limit below it matters."""


async def inspect(
    url: str, *, installation: str | None, queues: Sequence[str], prefix: str = PREFIX
) -> list[Finding]:
    """
    One finding per check, good ones too; checks that need a failed one are skipped.

    Args:
        installation: The installation that should own the names; None skips that check.
        queues: The task queues in use.
    """
    try:
        connection = await connect(url, name="asyncflow doctor", timeout_seconds=CALL_SECONDS)
    except (TransportError, InvalidSettings) as error:
        return [explained(error, prefix=prefix)]
    try:
        return [
            fine("RabbitMQ connection", f"{connection.server} at {connection.address} answers."),
            _version(connection.server),
            await _tried_out(connection, prefix),
            *await _sharing(connection, installation, prefix),
            *await _queues(connection, queues, prefix),
            *await _unreadable(connection, prefix),
        ]
    except TransportError as error:
        return [explained(error, prefix=prefix)]
    finally:
        await connection.close()


def _version(server: str) -> Finding:
    version = server.rpartition(" ")[2]
    major = version.partition(".")[0]
    if major.isdecimal() and int(major) < MAJOR_MIN:
        return wrong(
            "RabbitMQ version",
            f"{server} is too old: AsyncFlow returns messages to their queue without a limit.",
            f"Use RabbitMQ {MAJOR_MIN}.0 or newer.",
        )
    return fine("RabbitMQ version", f"It is {version}.")


async def _tried_out(connection: Connection, prefix: str) -> Finding:
    """
    Declare, fill, read and delete a queue like ours.
    """
    what = "RabbitMQ permissions"
    queue = f"doctor-{uuid4().hex}"
    name = broker_queue(queue, prefix=prefix)
    channel = await connection.channel()
    try:
        await declare_task_queue(channel, queue, prefix=prefix)
        await channel.confirm_select()
        kept = await _fill(channel, name)
        await channel.consume(
            name, prefetch=1, on_deliveries=lambda _: None, on_cancelled=lambda: None
        )
    except BrokerTimeout as error:
        if connection.blocked:
            return wrong(
                "RabbitMQ alarm",
                "RabbitMQ takes no messages: it has a memory or disk alarm.",
                "Give it memory or disk; meanwhile tasks are accepted, and wait.",
                may_pass=True,
            )
        return explained(error, prefix=prefix)
    except TransportError as error:
        return explained(error, prefix=prefix)
    finally:
        await _delete(connection, name)
    if kept < PROBES:
        return doubtful(
            "RabbitMQ policies",
            f"A queue like {broker_queue('…', prefix=prefix)} kept {kept} of {PROBES} messages: "
            "a policy or operator policy limits its length, or their age.",
            f"Exclude names that begin with {prefix}. from it.",
        )
    return fine(what, "Configure, write and read are granted, and quorum queues work.")


async def _fill(channel: Channel, name: str) -> int:
    """
    Send messages one by one, since limits take effect in between; return how many were kept.
    """
    for _ in range(PROBES):
        [result] = await channel.publish(
            [Message(name, b"")], exchange="", timeout_seconds=CALL_SECONDS
        )
        if result is not PublishResult.CONFIRMED:
            break
    counts = await channel.inspect_queue(name)
    return counts.messages if counts else 0


async def _delete(connection: Connection, name: str) -> None:
    if connection.is_open:
        channel = await connection.channel()
        try:
            await channel.delete_queue(name)
        except TransportError:
            pass  # It could not be declared either.
        finally:
            channel.abandon()


async def _sharing(connection: Connection, installation: str | None, prefix: str) -> list[Finding]:
    what = "RabbitMQ sharing"
    if installation is None:
        return []
    channel = await connection.channel()
    try:
        if await channel.inspect_queue(marker_queue(prefix)) is None:
            return [fine(what, f"The names {prefix}.* are not in use here yet.")]
        await own(channel, installation=installation, prefix=prefix, on_lost=channel.abandon)
    except TransportError as error:
        return [explained(error, prefix=prefix)]
    finally:
        channel.abandon()
    return [fine(what, f"The names {prefix}.* here belong to this installation.")]


async def _queues(connection: Connection, queues: Sequence[str], prefix: str) -> list[Finding]:
    found = []
    for queue in queues:
        channel = await connection.channel()
        try:
            if await channel.inspect_queue(broker_queue(queue, prefix=prefix)) is not None:
                await declare_task_queue(channel, queue, prefix=prefix)
        except TransportError as error:
            found.append(explained(error, prefix=prefix))
        finally:
            channel.abandon()
    return found or [fine("RabbitMQ queues", "The queues in use are as AsyncFlow declares them.")]


async def _unreadable(connection: Connection, prefix: str) -> list[Finding]:
    channel = await connection.channel()
    try:
        counts = await channel.inspect_queue(unreadable(prefix))
    finally:
        channel.abandon()
    if counts is None or not counts.messages:
        return []
    return [
        doubtful(
            "RabbitMQ messages",
            f"{counts.messages} messages in {unreadable(prefix)} are not task ids.",
            f"Find out what sends to {broker_queue('…', prefix=prefix)}, then purge the queue.",
        )
    ]
