"""
Measures AMQP clients at what the relay and the workers do: publish hints with confirms, and
consume and acknowledge them. The result is recorded in docs/internals/decisions.md ("What did
we write ourselves, and why?").

    python -m bench.amqp_clients [--rabbitmq 4.0 4.3] [--rounds 7] [--packs 1 10 50]

Messages are persistent and mandatory, the queue is a quorum queue, and publishes go out in
batches of the size of a relay round. The clients take turns, so that a drift in the machine's speed
affects all of them, and the figure is the CPU time of this process.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import ClassVar
from uuid import uuid4

import aio_pika
import aiormq
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

from asyncflow.transport.amqp import Channel, Connection, Delivery, Message, connect
from asyncflow.transport.rabbitmq.message import encode_hints
from bench.by_hand import end_on_sigterm, running_broker
from tests.support import rabbitmq

BATCH_HINTS = 500
WINDOW_HINTS = 400
ARGUMENTS = {"x-queue-type": "quorum"}


class Client(ABC):
    """
    One AMQP client, opened on an existing queue.
    """

    name: ClassVar[str]

    def __init__(self, url: str, queue: str) -> None:
        self.url = url
        self.queue = queue

    @abstractmethod
    async def open(self) -> None:
        """
        Connect, and declare the queue.
        """

    @abstractmethod
    async def publish(self, bodies: Sequence[bytes]) -> None:
        """
        Publish all bodies and wait for every confirm.
        """

    @abstractmethod
    async def consume(self, messages: int, *, prefetch: int) -> None:
        """
        Consume this many messages and acknowledge each.
        """

    @abstractmethod
    async def close(self) -> None:
        """
        Disconnect once all acknowledgements are written.
        """


class Ours(Client):
    name = "asyncflow"
    _connection: Connection
    _channel: Channel

    async def open(self) -> None:
        self._connection = await connect(self.url, name="bench", timeout_seconds=60)
        self._channel = await self._connection.channel()
        await self._channel.confirm_select()
        await self._channel.declare_queue(self.queue, arguments=ARGUMENTS)

    async def publish(self, bodies: Sequence[bytes]) -> None:
        messages = [Message(self.queue, body) for body in bodies]
        await self._channel.publish(messages, exchange="", timeout_seconds=60)

    async def consume(self, messages: int, *, prefetch: int) -> None:
        done = asyncio.get_running_loop().create_future()
        left = messages

        def take(deliveries: list[Delivery]) -> None:
            nonlocal left
            for delivery in deliveries:
                self._channel.ack(delivery.tag)
            left -= len(deliveries)
            if left <= 0 and not done.done():
                done.set_result(None)

        await self._channel.consume(
            self.queue, prefetch=prefetch, on_deliveries=take, on_cancelled=lambda: None
        )
        await done

    async def close(self) -> None:
        await self._connection.close()


class Aiormq(Client):
    name = "aiormq"
    _connection: aiormq.abc.AbstractConnection
    _channel: aiormq.abc.AbstractChannel

    async def open(self) -> None:
        self._connection = await aiormq.connect(self.url)
        self._channel = await self._connection.channel()
        await self._channel.queue_declare(self.queue, durable=True, arguments=ARGUMENTS)

    async def publish(self, bodies: Sequence[bytes]) -> None:
        await asyncio.gather(*(self._publish(body) for body in bodies))

    async def _publish(self, body: bytes) -> None:
        await self._channel.basic_publish(
            body,
            routing_key=self.queue,
            properties=Basic.Properties(delivery_mode=2),
            mandatory=True,
            wait=False,  # Do not wait for the socket; the confirm is awaited anyway.
        )

    async def consume(self, messages: int, *, prefetch: int) -> None:
        done = asyncio.get_running_loop().create_future()
        left = messages

        async def take(message: DeliveredMessage) -> None:
            nonlocal left
            await self._channel.basic_ack(message.delivery_tag, wait=False)
            left -= 1
            if left <= 0 and not done.done():
                done.set_result(None)

        await self._channel.basic_qos(prefetch_count=prefetch)
        await self._channel.basic_consume(self.queue, take)
        await done

    async def close(self) -> None:
        await self._connection.close()


class AioPika(Client):
    name = "aio-pika"
    _connection: aio_pika.abc.AbstractConnection
    _channel: aio_pika.abc.AbstractChannel
    _queue: aio_pika.abc.AbstractQueue

    async def open(self) -> None:
        self._connection = await aio_pika.connect(self.url)
        self._channel = await self._connection.channel(on_return_raises=True)
        self._queue = await self._channel.declare_queue(
            self.queue, durable=True, arguments=ARGUMENTS
        )

    async def publish(self, bodies: Sequence[bytes]) -> None:
        await asyncio.gather(*(self._publish(body) for body in bodies))

    async def _publish(self, body: bytes) -> None:
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await self._channel.default_exchange.publish(message, self.queue)

    async def consume(self, messages: int, *, prefetch: int) -> None:
        done = asyncio.get_running_loop().create_future()
        left = messages

        async def take(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            nonlocal left
            await message.ack()
            left -= 1
            if left <= 0 and not done.done():
                done.set_result(None)

        await self._channel.set_qos(prefetch_count=prefetch)
        await self._queue.consume(take)
        await done

    async def close(self) -> None:
        await self._connection.close()


CLIENTS: tuple[type[Client], ...] = (Ours, Aiormq, AioPika)


@dataclass(frozen=True, slots=True)
class Cost:
    """
    The cost of one piece of work.
    """

    cpu_seconds: float
    seconds: float


def main() -> None:
    """
    Measure every client on every version, and print a table for each.
    """
    options = _options()
    end_on_sigterm()
    for version in options.rabbitmq:
        with running_broker("rabbitmq", version) as broker:
            assert broker is not None
            url = broker.create_vhost()
            print(f"\nRabbitMQ {broker.version}", flush=True)
            for pack in options.packs:
                costs = asyncio.run(_measure(url, pack, rounds=options.rounds))
                _report(costs, pack)
            broker.drop_vhost(url)


async def _measure(url: str, pack: int, *, rounds: int) -> dict[tuple[str, str], list[Cost]]:
    costs: defaultdict[tuple[str, str], list[Cost]] = defaultdict(list)
    messages = _messages(pack)
    for number in range(rounds + 1):
        for client_class in CLIENTS[number % 3 :] + CLIENTS[: number % 3]:
            # A separate queue: messages left unacknowledged by another client would be redelivered.
            client = client_class(url, f"hints-{pack}-{number}-{client_class.name}")
            await client.open()
            published = await _cost(_publish(client, pack, messages))
            consumed = await _cost(client.consume(messages, prefetch=_prefetch(pack)))
            await client.close()
            if number:  # The first round warms up.
                costs[client.name, "publish"].append(published)
                costs[client.name, "consume and ack"].append(consumed)
    return costs


def _messages(pack: int) -> int:
    return 2_000 if pack > 1 else 4_000


def _prefetch(pack: int) -> int:
    return WINDOW_HINTS if pack == 1 else 1 + WINDOW_HINTS // pack


async def _publish(client: Client, pack: int, messages: int) -> None:
    body = encode_hints([uuid4() for _ in range(pack)])
    batch = [body] * (BATCH_HINTS // pack)
    for _ in range(messages // len(batch)):
        await client.publish(batch)


async def _cost(work: Awaitable[None]) -> Cost:
    gc.collect()
    cpu_began, began = time.process_time(), time.perf_counter()
    await work
    return Cost(time.process_time() - cpu_began, time.perf_counter() - began)


def _report(costs: dict[tuple[str, str], list[Cost]], pack: int) -> None:
    messages = _messages(pack)
    for (name, work), them in sorted(costs.items(), key=lambda item: item[0][::-1]):
        cpu = [1e6 * cost.cpu_seconds / messages for cost in them]
        rate = statistics.median(messages * pack / cost.seconds for cost in them)
        middle = statistics.median(cpu)
        print(
            f"  {pack:2} per message  {work:15}  {name:9}  CPU {middle:6.1f} µs per message"
            f" ({min(cpu):.1f} to {max(cpu):.1f}), {middle / pack:6.2f} per hint;"
            f" {rate:9,.0f} hints/s",
            flush=True,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.amqp_clients")
    parser.add_argument("--rabbitmq", nargs="+", default=rabbitmq.VERSIONS, metavar="VERSION")
    parser.add_argument("--packs", nargs="+", type=int, default=[1, 10, 50], metavar="HINTS")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


if __name__ == "__main__":
    main()
