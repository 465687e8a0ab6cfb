"""
RabbitMQ delivers messages that AsyncFlow did not send: garbage, foreign and forged messages by the
thousand, mixed with the hints of tasks. The tasks run once each, as if the messages were not there,
and each message that is not a hint is set aside once.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from pamqp import body, commands, frame, header
from pamqp.common import FieldTable

from asyncflow.transport.amqp import Connection, connect
from asyncflow.transport.rabbitmq.message import PACK_MAX, encode_hints
from asyncflow.transport.rabbitmq.topology import (
    broker_queue,
    declare_dead_letters,
    declare_task_queue,
    unreadable,
)
from tests.support.system import System

pytestmark = pytest.mark.needs_rabbitmq

QUEUE = broker_queue("default")
WAVES = 6
GARBAGE_PER_WAVE = 500
DUPLICATES_PER_WAVE = 100
FRAME_PAYLOAD_BYTES_MAX = 131_072 - 8
WORKING = {"seconds": 0.02}

Properties = commands.Basic.Properties


async def test_garbage_among_hints_is_put_aside_and_harms_no_task(system: System) -> None:
    """
    Under waves of three thousand bad messages and hundreds of duplicate and forged hints, every
    task completes, none runs twice, no connection breaks, and no message is redelivered in a loop.
    """
    assert system.broker_url is not None
    chance = random.Random(1)
    _, [worker], _ = await system.start()
    rubbish = itertools.islice(garbage(chance), WAVES * GARBAGE_PER_WAVE)
    connection = await connect(system.broker_url, name="stranger")
    try:
        async with system.load(payload=WORKING) as load:
            for _ in range(WAVES):
                await load.has_accepted(20)
                bad = list(itertools.islice(rubbish, GARBAGE_PER_WAVE))
                forged = [hints(load.accepted, chance) for _ in range(DUPLICATES_PER_WAVE)]
                messages = bad + forged
                chance.shuffle(messages)
                await publish(connection, messages)
            await load.has_accepted(20)
        assert {"completed": len(load.accepted)} == await system.all_terminal(load.accepted)

        put_aside = WAVES * GARBAGE_PER_WAVE
        await system.until(lambda: holds(connection, QUEUE, 0), "the task queue is empty")
        await system.until(lambda: holds(connection, unreadable(), put_aside), "all is put aside")
    finally:
        await connection.close()

    starts = Counter(entry.task_id for entry in system.journal.entries(what="start"))
    assert Counter(load.accepted) == starts
    assert not load.refused
    assert worker.is_running
    told = Counter(line["event"] for line in worker.lines)
    assert put_aside == told["message.unreadable"]
    assert 1 == told["broker.connected"]
    assert not [line for line in worker.lines if line["level"] == "error"]


def hints(task_ids: Sequence[str], chance: random.Random) -> bytes:
    """
    A message as the relay writes it, for tasks the relay would not send now: done, running, queued,
    unknown; alone or in packs, with properties the relay never sets.
    """
    known = [UUID(task_id) for task_id in chance.sample(task_ids, min(3, len(task_ids)))]
    told = chance.choice(
        [known[:1], known, known * 2, [uuid4()], [*known, uuid4()], known[:1] * PACK_MAX]
    )
    return message(encode_hints(told), odd_properties(chance))


def garbage(chance: random.Random) -> Iterator[bytes]:
    """
    An endless stream of messages that are not hints; about every tenth exceeds the size limit of a
    hint.
    """
    task_id = str(uuid4()).encode()
    for number in itertools.count():
        noise = chance.randbytes(chance.choice([1, 15, 16, 17, 35, 36, 37, 73, 200, 1_900]))
        yield message(
            chance.choice(
                [
                    b"",
                    noise,
                    b"\xff" + noise,
                    task_id[:-1],
                    task_id + b"\n",
                    task_id.upper()[:-1] + b"G",
                    task_id.replace(b"-", b""),
                    b"{" + task_id + b"}",
                    b'"' + task_id + b'"',
                    b"urn:uuid:" + task_id,
                    task_id.decode().encode("utf-16"),
                    b"\r\n".join([task_id] * 3),
                    b"\n".join([task_id] * (PACK_MAX + 1)),
                    b"\n".join([task_id] * (PACK_MAX - 1) + [b"x" * 36]),
                    b'{"id": "%b", "task": "tasks.add", "args": [1, 2]}' % task_id,
                    b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
                    b"\x1f\x8b\x08" + noise,
                ]
            )
            if number % 10
            else b"z" * chance.choice([1_850, 65_536, 65_537, 131_073, 300_000]),
            odd_properties(chance),
        )


def odd_properties(chance: random.Random) -> Properties:
    """
    Properties that AMQP lets a publisher set; AsyncFlow ignores all of them.
    """
    headers: FieldTable = {
        "x-death": "forged",
        "x-delivery-count": 1_000_000,
        "x-first-death-queue": QUEUE,
        "x-retries": -1,
        "task": "os.system",
        "nothing": None,
        "deep": {"list": [1, {"of": [True, bytearray(b"\x00\xff"), 1.5]}]},
        "long": "y" * 20_000,
        "at": datetime(2031, 1, 1, tzinfo=UTC),
    }
    some = dict(chance.sample(list(headers.items()), chance.randint(0, len(headers))))
    return Properties(
        content_type=chance.choice([None, "application/x-python-serialize", "\u2028"]),
        content_encoding=chance.choice([None, "gzip", "utf-16", "x" * 255]),
        headers=some,
        delivery_mode=chance.choice([None, 1, 2]),
        priority=chance.choice([None, 0, 9, 255]),
        correlation_id=chance.choice([None, "c" * 255]),
        reply_to=chance.choice([None, QUEUE]),
        expiration=chance.choice([None, "600000"]),
        message_id=chance.choice([None, "1"]),
        timestamp=chance.choice([None, datetime(1970, 1, 1, tzinfo=UTC)]),
        message_type=chance.choice([None, "task"]),
        app_id=chance.choice([None, "celery"]),
    )


def message(content: bytes, properties: Properties) -> bytes:
    """
    The frames of one publish to the task queue, without the channel number.

    Built by hand, because our own client sets only the properties it needs.
    """
    publish = commands.Basic.Publish(exchange="", routing_key=QUEUE)
    pieces = [
        content[start : start + FRAME_PAYLOAD_BYTES_MAX]
        for start in range(0, len(content), FRAME_PAYLOAD_BYTES_MAX)
    ]
    return b"".join(
        [
            frame.marshal(publish, CHANNEL),
            frame.marshal(header.ContentHeader(0, len(content), properties), CHANNEL),
            *(frame.marshal(body.ContentBody(piece), CHANNEL) for piece in pieces),
        ]
    )


CHANNEL = 1


async def publish(connection: Connection, messages: Sequence[bytes]) -> None:
    """
    Send all messages; the broker has read them when this returns.
    """
    channel = await connection.channel()
    assert channel.number == CHANNEL
    await declare_dead_letters(channel)
    connection.write(b"".join(messages))
    await declare_task_queue(channel, "default")
    await channel.close()


async def holds(connection: Connection, queue: str, count: int) -> bool:
    """
    Whether exactly this many messages wait in a queue.
    """
    channel = await connection.channel()
    counts = await channel.inspect_queue(queue)
    await channel.close()
    return counts is not None and counts.messages == count
