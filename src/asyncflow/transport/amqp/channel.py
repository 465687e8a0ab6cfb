"""
A channel: declaring queues, publishing with confirms, consuming and acknowledging.

Publishing and consuming belong on different connections: an alarm makes the broker stop
reading a publisher's connection, and with it the acks and calls sent on it.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast

from pamqp import base, commands
from pamqp.common import FieldValue

from asyncflow.errors import ChannelClosed, MalformedFrame, TransportError
from asyncflow.transport.amqp.calls import Calls, MethodT, within
from asyncflow.transport.amqp.frames import (
    Confirm,
    Delivery,
    Event,
    Message,
    Method,
    Returned,
    encode_ack,
    encode_method,
    encode_nack,
    encode_publish,
)

Arguments = Mapping[str, FieldValue]


class PublishResult(enum.Enum):
    """
    The outcome of publishing one message.
    """

    CONFIRMED = "confirmed"
    """A queue has it, on disk if the queue is durable."""
    RETURNED = "returned"
    """No queue is bound for its routing key: the message is gone."""
    REFUSED = "refused"
    """A queue is full or failed; another queue bound for the same key may have it."""


class QueueCounts(NamedTuple):
    """
    What a queue held when asked: messages ready (without the unacknowledged), consumers.
    """

    messages: int
    consumers: int


class Link(Protocol):
    """
    What a channel needs from its connection.
    """

    timeout_seconds: float
    payload_bytes_max: int
    takes_messages: asyncio.Event

    def write(self, frames: bytes) -> None:
        """
        Send frames, together with all others written in this turn of the event loop.
        """

    def release(self, number: int) -> None:
        """
        Free the number of a closed channel for reuse.
        """

    async def channel(self) -> Channel:
        """
        Open another channel.
        """


class Channel:
    """
    One channel, made by `Connection.channel`.

    Every call waits at most the connection's `timeout_seconds` and then raises
    `BrokerTimeout`; on a dead channel it raises the reason immediately, `ChannelClosed`
    or `ConnectionLost`. An error that the broker reports kills the channel.
    """

    def __init__(self, connection: Link, number: int) -> None:
        self.number = number
        self._connection = connection
        self._calls = Calls()
        self._confirming = False
        self._published = 0
        self._batches: list[_Batch] = []
        self._consumers: dict[str, _Consumer] = {}
        self._consumers_made = 0
        self._reason: TransportError | None = None
        self._leaving = False
        self._closed = asyncio.Event()
        self._released = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """
        Whether the channel is still usable.
        """
        return not self._closed.is_set()

    async def publish(
        self, messages: Sequence[Message], *, exchange: str, timeout_seconds: float
    ) -> list[PublishResult]:
        """
        Publish messages, persistent and mandatory, and wait for each one's confirm or return.

        All are written in one piece. Calls may overlap on one channel; the caller bounds how
        many. While the broker takes no messages (an alarm, or it does not read), nothing is
        written and the wait goes on.

        Returns:
            One result per message, in the messages' order.

        Raises:
            BrokerTimeout: Some were not answered within `timeout_seconds`; any of them may
                have reached a queue, or may still reach one.
            ChannelClosed, ConnectionLost: The same, and the channel is gone. 404: no exchange
                has this name.
        """
        if not self._confirming:
            raise RuntimeError("Call confirm_select before publish.")
        if not messages:
            return []
        publishing = self._publish(messages, exchange)
        return await within(timeout_seconds, "Basic.Publish", publishing)

    async def _publish(self, messages: Sequence[Message], exchange: str) -> list[PublishResult]:
        await self._connection.takes_messages.wait()
        self._ensure_open()
        batch = _Batch(self._published + 1, len(messages))
        frames = [
            encode_publish(
                message,
                channel=self.number,
                exchange=exchange,
                sequence=sequence,
                payload_bytes_max=self._connection.payload_bytes_max,
            )
            for sequence, message in enumerate(messages, batch.first)
        ]
        self._published += len(messages)
        self._batches.append(batch)
        self._connection.write(b"".join(frames))
        return await batch.done

    async def consume(
        self,
        queue: str,
        *,
        prefetch: int,
        on_deliveries: Callable[[list[Delivery]], None],
        on_cancelled: Callable[[], None],
    ) -> str:
        """
        Have the broker deliver the queue's messages, at most `prefetch` unacknowledged.

        Args:
            prefetch: 1 … 65535; 0 sets no limit.
            on_deliveries: Called once per read from the socket, with all its deliveries
                for this consumer. Must not raise: that kills the connection.
            on_cancelled: Called when the broker ends the consumer, for instance because
                the queue was deleted; the channel lives on and acks still count. Not
                called when the channel dies: see `wait_closed`.

        Returns:
            The consumer's tag, for `cancel`.

        Raises:
            BrokerTimeout: The channel is closed too, so that no deliveries go unread.
        """
        self._consumers_made += 1
        tag = f"{self.number}.{self._consumers_made}"
        consume = commands.Basic.Consume(queue=queue, consumer_tag=tag)
        try:
            # Sent together, because a prefetch applies to consumers that start after it.
            qos_ok = self._send(commands.Basic.Qos(prefetch_count=prefetch), commands.Basic.QosOk)
            consume_ok = self._send(consume, commands.Basic.ConsumeOk)
            self._consumers[tag] = _Consumer(tag, on_deliveries, on_cancelled)
            replies = asyncio.gather(qos_ok, consume_ok)
            await within(self._connection.timeout_seconds, consume.name, replies)
        except BaseException:
            self.abandon()
            raise
        return tag

    async def cancel(self, tag: str) -> None:
        """
        End a consumer. Deliveries may arrive until this returns, and can be acked afterwards.
        """
        await self._call(commands.Basic.Cancel(consumer_tag=tag), commands.Basic.CancelOk)
        self._consumers.pop(tag, None)

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """
        Acknowledge a delivery, and all before it if `multiple`; a no-op on a dead channel.

        Never waits and never fails: a dead channel's deliveries go back to their queues anyway.
        """
        if not self._closed.is_set():
            self._connection.write(encode_ack(self.number, tag, multiple=multiple))

    def nack(self, tag: int, *, requeue: bool, multiple: bool = False) -> None:
        """
        Give a delivery back to its queue, or to its dead-letter exchange; else as `ack`.
        """
        if not self._closed.is_set():
            frame = encode_nack(self.number, tag, multiple=multiple, requeue=requeue)
            self._connection.write(frame)

    async def confirm_select(self) -> None:
        """
        Have the broker confirm publishes; needed once, before the first `publish`.
        """
        await self._call(commands.Confirm.Select(), commands.Confirm.SelectOk)
        self._confirming = True

    async def declare_exchange(self, name: str, *, kind: str = "direct") -> None:
        """
        Make the exchange exist. `kind` is direct, topic, fanout or headers.

        Raises:
            ChannelClosed: 406: it exists with other properties.
        """
        declare = commands.Exchange.Declare(exchange=name, exchange_type=kind, durable=True)
        await self._call(declare, commands.Exchange.DeclareOk)

    async def declare_queue(self, name: str, *, arguments: Arguments | None = None) -> QueueCounts:
        """
        Make the queue exist.

        Raises:
            ChannelClosed: 406: it exists with other properties.
        """
        declare = commands.Queue.Declare(queue=name, durable=True, arguments=dict(arguments or {}))
        reply = await self._call(declare, commands.Queue.DeclareOk)
        return QueueCounts(reply.message_count or 0, reply.consumer_count or 0)

    async def inspect_queue(self, name: str) -> QueueCounts | None:
        """
        Count a queue's messages and consumers; None if it does not exist.

        Asks on a channel of its own, because the broker closes the channel if it does not.
        """
        probe = await self._connection.channel()
        try:
            declare = commands.Queue.Declare(queue=name, passive=True)
            reply = await probe._call(declare, commands.Queue.DeclareOk)
        except ChannelClosed as closed:
            if closed.code != 404:
                raise
            return None
        finally:
            probe.abandon()
        return QueueCounts(reply.message_count or 0, reply.consumer_count or 0)

    async def bind_queue(
        self,
        queue: str,
        *,
        exchange: str,
        routing_key: str,
        arguments: Arguments | None = None,
    ) -> None:
        """
        Have the exchange send what has this routing key to the queue as well.

        Raises:
            ChannelClosed: 404: there is no such queue or exchange.
        """
        bind = commands.Queue.Bind(
            queue=queue,
            exchange=exchange,
            routing_key=routing_key,
            arguments=dict(arguments or {}),
        )
        await self._call(bind, commands.Queue.BindOk)

    async def bind_exchange(self, name: str, *, source: str, routing_key: str) -> None:
        """
        Have the exchange `source` send what has this routing key to the exchange `name` as well.

        Raises:
            ChannelClosed: 404: there is no such exchange.
        """
        bind = commands.Exchange.Bind(destination=name, source=source, routing_key=routing_key)
        await self._call(bind, commands.Exchange.BindOk)

    async def delete_queue(self, name: str) -> int:
        """
        Delete the queue with all that is in it, if it exists; return how many were in it.
        """
        reply = await self._call(commands.Queue.Delete(queue=name), commands.Queue.DeleteOk)
        return reply.message_count or 0

    async def purge_queue(self, name: str) -> int:
        """
        Drop what is ready in the queue; return how many that were.

        Raises:
            ChannelClosed: 404: there is no such queue.
        """
        reply = await self._call(commands.Queue.Purge(queue=name), commands.Queue.PurgeOk)
        return reply.message_count or 0

    async def wait_closed(self) -> TransportError | None:
        """
        Wait until the channel is gone; return why, or None if this process closed it.
        """
        await self._closed.wait()
        return None if self._leaving else self._reason

    async def close(self) -> None:
        """
        Close the channel; what was not acknowledged goes back to its queues.
        """
        self.abandon()
        released = self._released.wait()
        await within(self._connection.timeout_seconds, "Channel.Close", released)

    def abandon(self) -> None:
        """
        Like `close`, without waiting for the broker.
        """
        if not self._closed.is_set():
            self._leaving = True
            self._fail(ChannelClosed(200, "this process closed it."))
            close = commands.Channel.Close(200, "Goodbye", 0, 0)
            self._connection.write(encode_method(self.number, close))

    async def open(self) -> None:
        """
        For the connection: open the channel on the broker.
        """
        await self._call(commands.Channel.Open(), commands.Channel.OpenOk)

    def end(self, reason: TransportError) -> None:
        """
        For the connection: fail everything that waits, because it or the channel is gone.
        """
        self._fail(reason)
        self._released.set()

    def take(self, event: Event) -> None:
        """
        For the connection: act on what the broker sent to this channel.

        Raises:
            MalformedFrame: The broker may not send this now.
        """
        if self._closed.is_set():
            self._take_late(event)
        elif isinstance(event, Delivery):
            self._consumer(event.consumer_tag).inbox.append(event)
        elif isinstance(event, Confirm):
            self._settle(event)
        elif isinstance(event, Returned):
            self._mark_returned(event)
        else:
            self.hand_over()
            self._take_method(event.method)

    def hand_over(self) -> None:
        """
        For the connection: give the consumers what has been taken for them.
        """
        for consumer in tuple(self._consumers.values()):
            if consumer.inbox:
                inbox, consumer.inbox = consumer.inbox, []
                consumer.on_deliveries(inbox)

    def _take_method(self, method: base.Frame) -> None:
        if isinstance(method, commands.Basic.Cancel):
            consumer = self._consumer(method.consumer_tag or "")
            del self._consumers[consumer.tag]
            consumer.on_cancelled()
        elif isinstance(method, commands.Channel.Close):
            self._connection.write(encode_method(self.number, commands.Channel.CloseOk()))
            self._connection.release(self.number)
            self.end(ChannelClosed(method.reply_code or 0, method.reply_text))
        else:
            self._calls.answer(method)

    def _take_late(self, event: Event) -> None:
        # We have closed the channel. Only two events still matter: the reply, and a close of the
        # broker's that crossed ours, which it wants answered although its reply is still due.
        method = event.method if isinstance(event, Method) else None
        if isinstance(method, commands.Channel.CloseOk):
            self._connection.release(self.number)
            self._released.set()
        elif isinstance(method, commands.Channel.Close):
            self._connection.write(encode_method(self.number, commands.Channel.CloseOk()))

    def _consumer(self, tag: str) -> _Consumer:
        if tag not in self._consumers:
            raise MalformedFrame("The broker named an unknown consumer.")
        return self._consumers[tag]

    def _settle(self, confirm: Confirm) -> None:
        for batch in self._batches:
            if batch.first > confirm.tag:
                break
            batch.settle(confirm)
        self._batches = [batch for batch in self._batches if batch.unanswered]

    def _mark_returned(self, returned: Returned) -> None:
        sequence = int(returned.message_id) if returned.message_id.isdecimal() else 0
        for batch in self._batches:
            if batch.first <= sequence < batch.first + len(batch.results):
                batch.returned.add(sequence - batch.first)

    def _fail(self, reason: TransportError) -> None:
        if self._closed.is_set():
            return
        self._reason = reason
        self._closed.set()
        self._calls.fail(reason)
        for batch in self._batches:
            batch.fail(reason)
        self._batches.clear()
        self._consumers.clear()

    def _ensure_open(self) -> None:
        if self._reason is not None:
            raise self._reason.with_traceback(None)

    def _send(self, method: base.Frame, reply: type[MethodT]) -> asyncio.Future[MethodT]:
        self._ensure_open()
        frame = encode_method(self.number, method)
        expected = self._calls.expect(reply)
        self._connection.write(frame)
        return expected

    async def _call(self, method: base.Frame, reply: type[MethodT]) -> MethodT:
        expected = self._send(method, reply)
        return await within(self._connection.timeout_seconds, method.name, expected)


class _Consumer:
    __slots__ = ("inbox", "on_cancelled", "on_deliveries", "tag")

    def __init__(
        self,
        tag: str,
        on_deliveries: Callable[[list[Delivery]], None],
        on_cancelled: Callable[[], None],
    ) -> None:
        self.tag = tag
        self.inbox: list[Delivery] = []
        self.on_deliveries = on_deliveries
        self.on_cancelled = on_cancelled


class _Batch:
    """
    The messages of one `publish` call, numbered from `first` on.

    A batch whose caller has timed out stays until it is answered: numbering goes on.
    """

    __slots__ = ("_low", "done", "first", "results", "returned", "unanswered")

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.results: list[PublishResult | None] = [None] * count
        self.unanswered = count
        self.returned: set[int] = set()
        self.done: asyncio.Future[list[PublishResult]]
        self.done = asyncio.get_running_loop().create_future()
        self._low = 0  # All before this index are answered.

    def settle(self, confirm: Confirm) -> None:
        end = min(confirm.tag - self.first + 1, len(self.results))
        if confirm.multiple:
            start, self._low = self._low, max(self._low, end)
        else:
            start = confirm.tag - self.first
        for index in range(start, end):
            if self.results[index] is None:
                self.results[index] = self._result(index, confirm.accepted)
                self.unanswered -= 1
        if not self.unanswered and not self.done.done():
            self.done.set_result(cast("list[PublishResult]", self.results))

    def _result(self, index: int, accepted: bool) -> PublishResult:
        if not accepted:
            return PublishResult.REFUSED
        return PublishResult.RETURNED if index in self.returned else PublishResult.CONFIRMED

    def fail(self, reason: TransportError) -> None:
        if not self.done.done():
            self.done.set_exception(reason)
