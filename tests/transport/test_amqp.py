"""
Guarantees of the AMQP client, tested against a real broker and a wire that can be tampered with.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pamqp.common import FieldValue

from asyncflow.errors import InvalidSettings
from asyncflow.transport.amqp import (
    BrokerRefused,
    BrokerTimeout,
    BrokerUnreachable,
    Channel,
    ChannelClosed,
    Connection,
    ConnectionLost,
    Delivery,
    Message,
    PublishResult,
    connect,
)
from asyncflow.transport.amqp.url import parse_url
from tests.support.broker import Broker
from tests.transport.wire import Wire

pytestmark = pytest.mark.every_rabbitmq

CONFIRMED, RETURNED, REFUSED = PublishResult
PATIENCE_SECONDS = 20.0


@pytest.fixture
async def connection(broker_url: str) -> AsyncIterator[Connection]:
    """
    A connection for the test alone.
    """
    connection = await connect(broker_url, name="test")
    yield connection
    await connection.close()


@pytest.fixture
async def channel(connection: Connection) -> Channel:
    """
    A channel in confirm mode.
    """
    return await confirming(connection)


@pytest.fixture
async def queue(broker_url: str) -> str:
    """
    A quorum queue.
    """
    async with connected(broker_url) as connection:
        declaring = await connection.channel()
        await declaring.declare_queue("queue", arguments={"x-queue-type": "quorum"})
    return "queue"


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncIterator[Connection]:
    """
    A connection for one block.
    """
    connection = await connect(url, name="test", **options)
    try:
        yield connection
    finally:
        await connection.close()


async def confirming(connection: Connection) -> Channel:
    """
    A new channel in confirm mode.
    """
    channel = await connection.channel()
    await channel.confirm_select()
    return channel


async def publish(channel: Channel, queue: str, *bodies: bytes) -> list[PublishResult]:
    """
    Publish bodies directly to a queue.
    """
    messages = [Message(queue, body) for body in bodies]
    return await channel.publish(messages, exchange="", timeout_seconds=PATIENCE_SECONDS)


async def settled(channel: Channel, queue: str, *, messages: int, consumers: int) -> None:
    """
    Wait until the queue reports these counts, which the broker updates with a delay.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await channel.inspect_queue(queue) != (messages, consumers):
            pass


class Inbox:
    """
    A consumer that collects deliveries and lets a test wait for them.
    """

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self.reads = 0
        self.cancelled = asyncio.Event()
        self._arrived = asyncio.Condition()

    async def listen(self, channel: Channel, queue: str, *, prefetch: int = 100) -> str:
        """
        Start consuming and return the consumer's tag.
        """
        return await channel.consume(
            queue, prefetch=prefetch, on_deliveries=self._take, on_cancelled=self.cancelled.set
        )

    async def bodies(self, count: int) -> list[bytes | None]:
        """
        Wait for at least `count` deliveries; return all bodies.
        """
        async with asyncio.timeout(PATIENCE_SECONDS), self._arrived:
            await self._arrived.wait_for(lambda: len(self.deliveries) >= count)
        return [delivery.body for delivery in self.deliveries]

    def _take(self, deliveries: list[Delivery]) -> None:
        self.reads += 1
        self.deliveries += deliveries
        self._notifying = asyncio.ensure_future(self._notify())

    async def _notify(self) -> None:
        async with self._arrived:
            self._arrived.notify_all()


async def test_a_publish_is_confirmed_when_its_queue_has_it(channel: Channel, queue: str) -> None:
    """
    CONFIRMED means that a consumer will get the message.
    """
    results = await publish(channel, queue, b"one", b"two")

    assert results == [CONFIRMED, CONFIRMED]
    inbox = Inbox()
    await inbox.listen(channel, queue)
    assert [b"one", b"two"] == await inbox.bodies(2)


async def test_exactly_the_unroutable_messages_of_a_batch_are_returned(
    channel: Channel, queue: str
) -> None:
    """
    Exactly the unroutable messages are returned, even among messages with the same body.
    """
    messages = [Message(queue if n % 3 else "nowhere", b"same") for n in range(300)]

    results = await channel.publish(messages, exchange="", timeout_seconds=PATIENCE_SECONDS)

    assert results == [CONFIRMED if n % 3 else RETURNED for n in range(300)]


async def test_a_full_queue_refuses_a_message(channel: Channel) -> None:
    """
    A full queue rejects a message, which is reported as REFUSED.
    """
    await channel.declare_queue(
        "full", arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )

    first = await publish(channel, "full", b"fits")
    others = await publish(channel, "full", b"too many", b"too many")

    assert (first, others) == ([CONFIRMED], [REFUSED, REFUSED])


async def test_publishes_at_the_same_time_each_get_their_own_results(
    channel: Channel, queue: str
) -> None:
    """
    Concurrent batches each get their own results.
    """
    batches = [
        [Message(queue if n % (k + 2) else "nowhere", b"") for n in range(50)] for k in range(20)
    ]

    results = await asyncio.gather(
        *(channel.publish(b, exchange="", timeout_seconds=PATIENCE_SECONDS) for b in batches)
    )

    assert results == [
        [CONFIRMED if n % (k + 2) else RETURNED for n in range(50)] for k in range(20)
    ]


async def test_a_publish_that_gave_up_does_not_disturb_the_next(
    channel: Channel, queue: str
) -> None:
    """
    Late confirms of a cancelled publish are not counted for the next one.
    """
    with pytest.raises(BrokerTimeout):
        await channel.publish([Message("nowhere", b"x")] * 50, exchange="", timeout_seconds=0)

    assert await publish(channel, queue, b"a", b"b") == [CONFIRMED, CONFIRMED]


async def test_publishing_nothing_returns_immediately(channel: Channel) -> None:
    """
    Publishing an empty batch returns immediately, without the broker.
    """
    assert [] == await channel.publish([], exchange="", timeout_seconds=0)


async def test_publishing_needs_confirms(connection: Connection) -> None:
    """
    Publishing on a channel without confirms is refused, since it would wait forever.
    """
    channel = await connection.channel()

    with pytest.raises(RuntimeError, match="confirm_select"):
        await channel.publish([Message("q", b"")], exchange="", timeout_seconds=1)


async def test_a_missing_exchange_fails_all_who_wait_on_the_channel(
    connection: Connection, channel: Channel, queue: str
) -> None:
    """
    A missing exchange closes the channel with the broker's reason, but not the connection.
    """
    outcomes = await asyncio.gather(
        channel.publish([Message("k", b"")], exchange="no-such", timeout_seconds=PATIENCE_SECONDS),
        channel.purge_queue(queue),
        channel.wait_closed(),
        return_exceptions=True,
    )

    assert [404, 404, 404] == [o.code for o in outcomes if isinstance(o, ChannelClosed)]
    with pytest.raises(ChannelClosed):
        await publish(channel, queue, b"x")
    assert await publish(await confirming(connection), queue, b"x") == [CONFIRMED]


@pytest.mark.parametrize("size", [0, 1, 16, 65_536])
async def test_a_body_of_any_size_arrives_whole(channel: Channel, queue: str, size: int) -> None:
    """
    A body of any size arrives whole, including an empty one and one that takes several reads.
    """
    body = bytes(n % 251 for n in range(size))
    inbox = Inbox()
    await inbox.listen(channel, queue)

    assert await publish(channel, queue, body) == [CONFIRMED]
    assert await inbox.bodies(1) == [body]


async def test_a_huge_body_arrives_as_none(channel: Channel, queue: str) -> None:
    """
    A message too large to be ours is delivered without its body, so it does not fill the memory.
    """
    inbox = Inbox()
    await inbox.listen(channel, queue)

    await publish(channel, queue, b"x" * 1_000_000, b"next")

    assert [None, b"next"] == await inbox.bodies(2)


async def test_headers_and_routing_key_arrive(channel: Channel, queue: str) -> None:
    """
    Headers and routing key arrive along with the body.
    """
    inbox = Inbox()
    await inbox.listen(channel, queue)
    headers: dict[str, FieldValue] = {"traceparent": "00-abc-def-01", "n": 1}

    await channel.publish(
        [Message(queue, b"", priority=5, headers=headers)], exchange="", timeout_seconds=5
    )

    await inbox.bodies(1)
    (delivery,) = inbox.deliveries
    assert (delivery.routing_key, delivery.headers) == (queue, headers)
    assert delivery.redelivered is False


async def test_what_is_not_acked_comes_again(
    connection: Connection, channel: Channel, queue: str
) -> None:
    """
    Closing the channel requeues unacknowledged messages, and only those.
    """
    await publish(channel, queue, b"a", b"b", b"c")
    consuming, inbox = await connection.channel(), Inbox()
    await inbox.listen(consuming, queue)
    await inbox.bodies(3)
    consuming.ack(inbox.deliveries[1].tag, multiple=True)

    await consuming.close()

    again = Inbox()
    await again.listen(channel, queue)
    assert [b"c"] == await again.bodies(1)
    assert again.deliveries[0].redelivered is True


async def test_a_nack_gives_back_or_drops(channel: Channel, queue: str) -> None:
    """
    A nack requeues or drops, as `requeue` says, on a queue without a dead-letter exchange.
    """
    await publish(channel, queue, b"keep", b"drop")
    inbox = Inbox()
    tag = await inbox.listen(channel, queue)
    await inbox.bodies(2)
    await channel.cancel(tag)

    channel.nack(inbox.deliveries[0].tag, requeue=True)
    channel.nack(inbox.deliveries[1].tag, requeue=False)

    again = Inbox()
    await again.listen(channel, queue)
    assert [b"keep"] == await again.bodies(1)


async def test_prefetch_bounds_what_is_unacknowledged(channel: Channel, queue: str) -> None:
    """
    At the prefetch limit, the next message is delivered only once one is acked.
    """
    await publish(channel, queue, *(b"%d" % n for n in range(5)))
    inbox = Inbox()
    await inbox.listen(channel, queue, prefetch=2)
    await inbox.bodies(2)
    await settled(channel, queue, messages=3, consumers=1)

    channel.ack(inbox.deliveries[0].tag)

    assert [b"0", b"1", b"2"] == await inbox.bodies(3)


async def test_nothing_is_delivered_after_cancel(channel: Channel, queue: str) -> None:
    """
    A cancelled consumer gets no deliveries, and its acks still count.
    """
    inbox = Inbox()
    tag = await inbox.listen(channel, queue)
    await publish(channel, queue, b"before")
    await inbox.bodies(1)

    await channel.cancel(tag)
    await publish(channel, queue, b"after")
    channel.ack(inbox.deliveries[0].tag)

    await settled(channel, queue, messages=1, consumers=0)
    assert [b"before"] == await inbox.bodies(1)
    assert not inbox.cancelled.is_set()


async def test_a_consumer_learns_that_the_broker_cancelled_it(channel: Channel, queue: str) -> None:
    """
    When a queue is deleted its consumer is told, and nothing else is affected.
    """
    inbox = Inbox()
    await inbox.listen(channel, queue)

    await channel.delete_queue(queue)

    await asyncio.wait_for(inbox.cancelled.wait(), PATIENCE_SECONDS)
    assert await channel.inspect_queue(queue) is None


async def test_a_wrong_ack_closes_the_channel(channel: Channel, queue: str) -> None:
    """
    A wrong ack closes the channel, which `wait_closed` reports; later acks do nothing.
    """
    channel.ack(99)

    reason = await asyncio.wait_for(channel.wait_closed(), PATIENCE_SECONDS)

    assert isinstance(reason, ChannelClosed)
    assert 406 == reason.code
    channel.ack(1)
    channel.nack(1, requeue=True)


async def test_consuming_from_a_missing_queue_fails(channel: Channel) -> None:
    """
    Consuming from a missing queue fails with the broker's reason.
    """
    with pytest.raises(ChannelClosed) as caught:
        await Inbox().listen(channel, "no-such-queue")

    assert 404 == caught.value.code


async def test_every_published_message_is_consumed_exactly_once(
    connection: Connection, queue: str
) -> None:
    """
    Of 100,000 messages through publish, confirm, deliver and ack, none is lost or duplicated.
    """
    total, batch = 100_000, 500
    bodies = [b"%d" % n for n in range(total)]
    received: list[bytes | None] = []
    done = asyncio.Event()
    consuming, publishing = await connection.channel(), await confirming(connection)

    def take(deliveries: list[Delivery]) -> None:
        received.extend(delivery.body for delivery in deliveries)
        consuming.ack(deliveries[-1].tag, multiple=True)
        if len(received) >= total:
            done.set()

    await consuming.consume(queue, prefetch=1000, on_deliveries=take, on_cancelled=done.set)
    for start in range(0, total, batch):
        results = await publish(publishing, queue, *bodies[start : start + batch])
        assert results == [CONFIRMED] * batch

    await asyncio.wait_for(done.wait(), 60)
    assert sorted(received, key=lambda body: int(body or b"")) == bodies
    await consuming.close()
    await settled(publishing, queue, messages=0, consumers=0)


async def test_an_exchange_routes_by_its_bindings(channel: Channel, queue: str) -> None:
    """
    A declared exchange routes messages to the queue bound to it.
    """
    await channel.declare_exchange("exchange", kind="topic")
    await channel.bind_queue(queue, exchange="exchange", routing_key="tasks.#")
    messages = [Message("tasks.mail", b""), Message("other", b"")]

    results = await channel.publish(messages, exchange="exchange", timeout_seconds=5)

    assert results == [CONFIRMED, RETURNED]
    assert 1 == await channel.purge_queue(queue)


async def test_a_queue_cannot_be_declared_twice_with_other_properties(
    channel: Channel, queue: str
) -> None:
    """
    Redeclaring a queue with other properties fails with 406, so that the operator learns of it.
    """
    with pytest.raises(ChannelClosed) as caught:
        await channel.declare_queue(queue, arguments={"x-queue-type": "classic"})

    assert 406 == caught.value.code


async def test_a_reply_goes_to_the_call_it_answers_though_an_earlier_one_gave_up(
    channel: Channel, queue: str
) -> None:
    """
    A cancelled call's late reply is not mistaken for the next call's.
    """
    await publish(channel, queue, b"x")
    abandoned = asyncio.ensure_future(channel.declare_queue("other"))
    await asyncio.sleep(0)
    abandoned.cancel()

    assert 1 == await channel.purge_queue(queue)
    assert 0 == await channel.delete_queue("other")


@pytest.mark.any_rabbitmq
async def test_channel_numbers_are_used_again(connection: Connection) -> None:
    """
    Opening and closing channels repeatedly never runs out of numbers.
    """
    for _ in range(2100):
        await (await connection.channel()).close()

    assert 1 == (await connection.channel()).number


async def test_closing_ends_all_waiting_calls_immediately(broker_url: str, queue: str) -> None:
    """
    `close` ends everything that waits for an answer, and is not reported as a fault.
    """
    connection = await connect(broker_url, name="test")
    channel = await confirming(connection)
    publishing = asyncio.ensure_future(publish(channel, queue, b"x"))
    await asyncio.sleep(0)

    await connection.close()

    assert await connection.wait_closed() is None
    with pytest.raises(ConnectionLost, match="this process closed it"):
        await publishing
    with pytest.raises(ConnectionLost):
        await connection.channel()
    await connection.close()


async def test_acks_written_before_close_are_not_lost(
    broker_url: str, channel: Channel, queue: str
) -> None:
    """
    Acks written before `close` are sent first.
    """
    await publish(channel, queue, b"x")
    async with connected(broker_url) as consuming:
        inbox = Inbox()
        consumer = await consuming.channel()
        await inbox.listen(consumer, queue)
        await inbox.bodies(1)
        consumer.ack(inbox.deliveries[0].tag)

    await settled(channel, queue, messages=0, consumers=0)


def with_login(url: str, login: str) -> str:
    """
    The URL with another user and password.
    """
    parts = urlsplit(url)
    return parts._replace(netloc=f"{login}@{parts.hostname}:{parts.port}").geturl()


async def test_a_wrong_password_is_refused_without_repeating_it(broker_url: str) -> None:
    """
    A wrong password raises BrokerRefused, unlike an outage, and is not repeated in the error.
    """
    with pytest.raises(BrokerRefused) as caught:
        await connect(with_login(broker_url, "guest:wrong%2Fsecret"), name="test")

    assert 403 == caught.value.code
    assert "secret" not in str(caught.value)


async def test_a_missing_vhost_is_refused(broker_url: str) -> None:
    """
    A missing virtual host, whose name is percent-decoded, raises BrokerRefused too.
    """
    url = urlsplit(broker_url)._replace(path="/no%2Fsuch").geturl()

    with pytest.raises(BrokerRefused, match="no/such"):
        await connect(url, name="test")


async def test_a_port_without_a_broker_is_unreachable() -> None:
    """
    A refused connection raises BrokerUnreachable.
    """
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1 "):
        await connect("amqp://127.0.0.1:1", name="test")


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x01\x00\x00"])
async def test_a_port_that_speaks_no_amqp_is_unreachable(greeting: bytes) -> None:
    """
    Neither silence nor garbage keeps the caller waiting beyond the timeout.
    """

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        greeted.append(writer)

    greeted: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    with pytest.raises(BrokerUnreachable):
        await connect(f"amqp://127.0.0.1:{port}", name="test", timeout_seconds=0.3)

    for writer in greeted:
        writer.close()
    server.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@host",
        "amqp://",
        "amqp://user:hunter/2@host",
        "amqp://user:hunter#2@host",
        "amqp://user:hunter2@host:99999",
        "amqp://user:hunter2@[host",
        "amqp://user:hunter2@host?verify=false",
        "amqps://user:hunter2@host?verify=maybe",
        "amqps://user:hunter2@host?verify",
        "amqps://user:hunter2@host?cafile=/no/such/file",
        "amqps://user:hunter2@host?verfiy=false",
        "amqp://user:1?hunter2=a@host",
        "amqps://user:hunter2@host?certfile=/no/such/file",
    ],
)
async def test_a_wrong_url_is_refused_without_repeating_the_password(url: str) -> None:
    """
    A URL that cannot be parsed is not repeated, since the password may be anywhere in it.
    """
    with pytest.raises(InvalidSettings) as caught:
        await connect(url, name="test")

    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("heartbeat=0", "heartbeat in the broker URL must be a whole number of seconds from 1"),
        ("heartbeat=soon", "heartbeat in the broker URL must be a whole number of seconds"),
        ("connection_timeout=1.5", "connection_timeout in the broker URL must be a whole number"),
        ("connection_attempts=3", "unknown parameter connection_attempts; AsyncFlow knows "),
        ("auth_mechanism=external", "auth_mechanism in the broker URL must be plain."),
        ("cacertfile=x", "cacertfile in the broker URL needs a URL that begins with amqps://."),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_name(query: str, sentence: str) -> None:
    """
    An unsupported parameter is refused by name; ignored, it would be missed the day it matters.
    """
    with pytest.raises(InvalidSettings) as caught:
        parse_url(f"amqp://user:hunter2@host/?{query}")

    assert sentence in str(caught.value)
    assert "hunter" not in str(caught.value)


async def test_parameters_of_the_url_are_honoured(broker: Broker, broker_url: str) -> None:
    """
    Heartbeat, channel and frame limits of the URL are negotiated with the broker, and a short
    connection timeout is kept.
    """
    url = f"{broker_url}?heartbeat=30&channel_max=8&frame_max=8192"
    async with connect_named(url, "with parameters") as connection:
        told = await asyncio.to_thread(
            broker.ctl, "list_connections", "timeout", "channel_max", "frame_max", "--silent"
        )
        channels = [await connection.channel() for _ in range(8)]
        with pytest.raises(ChannelClosed):
            await connection.channel()
        assert 8 == len(channels)

    assert "30\t8\t8192" in told
    assert 0.25 == parse_url("amqp://host/?connection_timeout=250").timeout_seconds


async def test_a_killed_broker_is_noticed_within_a_second(broker: Broker, broker_url: str) -> None:
    """
    Calls that wait for the connection or its channels fail immediately; a new connection can be
    made.
    """
    # Without a queue: RabbitMQ 4.0 forgets a queue that is only a few seconds old.
    connection = await connect(broker_url, name="test")
    channel = await confirming(connection)
    try:
        await asyncio.to_thread(broker.kill)

        reason = await asyncio.wait_for(connection.wait_closed(), 1)
        assert isinstance(reason, ConnectionLost)
        assert await channel.wait_closed() is reason
        with pytest.raises(ConnectionLost):
            await publish(channel, "nowhere", b"x")
    finally:
        await asyncio.to_thread(broker.start)
    async with connected(broker_url, timeout_seconds=30) as again:
        assert await publish(await confirming(again), "nowhere", b"x") == [RETURNED]


async def test_a_connection_closed_by_the_operator_says_so(broker: Broker, broker_url: str) -> None:
    """
    A connection closed by the operator fails with the operator's reason.
    """
    async with connected(broker_url) as connection:
        await asyncio.to_thread(
            broker.ctl, "close_all_connections", "--global", "maintenance tonight"
        )

        reason = await asyncio.wait_for(connection.wait_closed(), PATIENCE_SECONDS)

    assert isinstance(reason, ConnectionLost)
    assert "maintenance tonight" in str(reason)


@pytest.mark.any_rabbitmq
async def test_a_frozen_broker_is_given_up_after_two_heartbeats(
    broker_url: str, queue: str
) -> None:
    """
    Two heartbeats of silence count as a lost connection, though TCP notices nothing.
    """
    async with (
        Wire(broker_url).laid() as wire,
        connected(wire.url, heartbeat_seconds=1) as connection,
    ):
        channel = await confirming(connection)
        wire.freeze()
        publishing = asyncio.ensure_future(publish(channel, queue, b"x"))

        reason = await asyncio.wait_for(connection.wait_closed(), 4)

        assert isinstance(reason, ConnectionLost)
        assert "silent" in str(reason)
        with pytest.raises(ConnectionLost):
            await publishing


@pytest.mark.any_rabbitmq
async def test_an_idle_connection_lives_on(broker_url: str) -> None:
    """
    Heartbeats keep an idle connection alive in both directions.
    """
    async with connected(broker_url, heartbeat_seconds=1) as connection:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(connection.wait_closed(), 4)

        assert connection.is_open


@pytest.mark.any_rabbitmq
async def test_a_call_is_given_up_in_time_and_close_too(broker_url: str) -> None:
    """
    A call and `close` to a broker that does not answer end within their timeouts.
    """
    async with Wire(broker_url).laid() as wire:
        connection = await connect(wire.url, name="test", timeout_seconds=0.2)
        channel = await connection.channel()
        wire.freeze()

        async with asyncio.timeout(3):
            with pytest.raises(BrokerTimeout, match=r"Queue\.Delete"):
                await channel.delete_queue("q")
            await connection.close(0.2)

        assert await connection.wait_closed() is None


@pytest.mark.any_rabbitmq
async def test_what_is_not_written_for_lack_of_a_reader_is_never_sent(
    broker_url: str, queue: str
) -> None:
    """
    Publishing to a peer that does not read times out without queueing up messages.
    """
    timeouts = 0
    async with Wire(broker_url).laid() as wire, connected(wire.url) as connection:
        channel = await confirming(connection)
        wire.freeze()
        for _ in range(60):
            try:
                await channel.publish(
                    [Message(queue, b"x" * 500_000)], exchange="", timeout_seconds=0.05
                )
            except BrokerTimeout:
                timeouts += 1
        wire.thaw()
        assert await publish(channel, queue, b"last") == [CONFIRMED]

        counts = await channel.inspect_queue(queue)

    assert 60 == timeouts
    assert counts is not None
    assert counts.messages < 50


@pytest.mark.parametrize(
    "noise", [b"\xff" * 20, b"\x01\x00\x00\x00\x00\x00\x04\x00\x0a\x00\x29\xce"]
)
async def test_nonsense_from_the_broker_loses_the_connection_cleanly(
    broker_url: str, noise: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """
    Neither malformed frames nor unsolicited answers hang or raise; the connection is lost cleanly.
    """
    caplog.set_level(logging.ERROR, "asyncio")
    async with Wire(broker_url).laid() as wire, connected(wire.url) as connection:
        wire.say(noise)

        reason = await asyncio.wait_for(connection.wait_closed(), PATIENCE_SECONDS)

    assert isinstance(reason, ConnectionLost)
    assert [] == caplog.records


async def test_an_alarm_blocks_publishers_only_and_passes(
    broker: Broker, broker_url: str, channel: Channel, queue: str
) -> None:
    """
    While the broker is short of memory, publishes time out and acks still count; afterwards
    everything resumes on its own.
    """
    await publish(channel, queue, b"x")
    blocked: asyncio.Queue[bool] = asyncio.Queue()
    inbox = Inbox()
    async with (
        connected(broker_url) as consuming,
        connected(broker_url, on_blocked=blocked.put_nowait) as publishing,
    ):
        consumer, publisher = await consuming.channel(), await confirming(publishing)
        await inbox.listen(consumer, queue)
        await inbox.bodies(1)
        await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0")
        try:
            with pytest.raises(BrokerTimeout):
                await publisher.publish([Message(queue, b"y")], exchange="", timeout_seconds=1)
            assert await asyncio.wait_for(blocked.get(), PATIENCE_SECONDS) is True
            assert publishing.blocked
            with pytest.raises(BrokerTimeout):
                await publisher.publish([Message(queue, b"z")], exchange="", timeout_seconds=0.1)
            consumer.ack(inbox.deliveries[0].tag)
            await settled(consumer, queue, messages=0, consumers=1)
        finally:
            await asyncio.to_thread(broker.ctl, "set_vm_memory_high_watermark", "0.6")

        assert await asyncio.wait_for(blocked.get(), PATIENCE_SECONDS) is False
        assert await publish(publisher, queue, b"w") == [CONFIRMED]
        # "y" was in flight when the alarm was raised; "z" was never written.
        assert [b"y", b"w"] == (await inbox.bodies(3))[1:]


async def test_a_consumer_that_raises_loses_the_connection(
    broker_url: str, channel: Channel, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """
    A bug in a consumer is loud: its messages are requeued, and every waiting call fails with the
    cause.
    """

    def stumble(_: list[Delivery]) -> None:
        raise ZeroDivisionError

    await publish(channel, queue, b"x")
    async with connected(broker_url) as connection:
        consumer = await connection.channel()
        await consumer.consume(queue, prefetch=1, on_deliveries=stumble, on_cancelled=lambda: None)

        reason = await asyncio.wait_for(connection.wait_closed(), PATIENCE_SECONDS)

    assert isinstance(reason, ConnectionLost)
    assert isinstance(reason.__cause__, ZeroDivisionError)
    assert "data_received" in caplog.text
    inbox = Inbox()
    await inbox.listen(channel, queue)
    assert [b"x"] == await inbox.bodies(1)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """
    A function that makes a self-signed certificate for localhost and returns its file and its
    key's.
    """

    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        files = folder / "certificate.pem", folder / "key.pem"
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        outputs = ["-out", str(files[0]), "-keyout", str(files[1])]
        subprocess.run([*request, *subject, *outputs], check=True, capture_output=True)
        return files

    return make


@pytest.mark.any_rabbitmq
async def test_tls_is_verified_unless_told_otherwise(
    broker_url: str, certificate: Callable[[str], tuple[Path, Path]]
) -> None:
    """
    A certificate of an unknown authority is rejected unless verification is off.
    """
    ours, key = certificate("ours")
    theirs, _ = certificate("theirs")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(ours, key)

    async with Wire(broker_url).laid(context) as wire:
        for wrong in ("", f"?cafile={theirs}"):
            with pytest.raises(BrokerUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await connect(wire.url + wrong, name="test")
        for right in (
            f"?cafile={ours}",
            f"?cacertfile={ours}&verify=verify_peer",
            "?verify=false",
            f"?verify=verify_none&certfile={ours}&keyfile={key}",
        ):
            async with connected(wire.url + right) as connection:
                assert connection.server.startswith("RabbitMQ")
        with pytest.raises(BrokerUnreachable, match=r"(?i)mismatch"):
            await connect(wire.url.replace("localhost", "127.0.0.1") + f"?cafile={ours}", name="t")
        by_address = wire.url.replace("localhost", "127.0.0.1")
        named = f"{by_address}?cafile={ours}&server_name_indication=localhost"
        async with connected(named) as connection:
            assert connection.server.startswith("RabbitMQ")


async def test_the_brokers_tools_show_the_connections_name(broker: Broker, broker_url: str) -> None:
    """
    The broker's tools show the connection's name, so an operator sees which process it belongs to.
    """
    async with connect_named(broker_url, "worker 0192"):
        listed = await asyncio.to_thread(
            broker.ctl, "list_connections", "client_properties", "--silent"
        )

    assert "worker 0192" in listed


@asynccontextmanager
async def connect_named(url: str, name: str) -> AsyncIterator[Connection]:
    """
    A connection with this name.
    """
    connection = await connect(url, name=name)
    try:
        yield connection
    finally:
        await connection.close()
