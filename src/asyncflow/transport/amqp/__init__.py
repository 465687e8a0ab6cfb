"""
A client for RabbitMQ: AMQP 0-9-1, spoken in batches.

What lives here: connecting and logging in, calls and their replies, publishing with
confirms, consuming, acks, heartbeats. What does not: any policy of ours, such as
reconnecting, topology, or what a message means; that is `transport.rabbitmq`.

The protocol in seven sentences. A TCP connection carries numbered channels; channel 0 is
the connection itself. Calls on one channel are answered in their order, so a queue of
expected replies is all the bookkeeping they need; a call that timed out stays in the queue
to swallow its late reply. A mistake on a channel makes the broker close that channel, and
its unacknowledged deliveries go back to their queues; a mistake on channel 0 closes the
connection. Publishes are numbered 1, 2, 3 … per channel and confirmed by number, in any
order, singly or "all up to this"; an unroutable one is first returned, then confirmed. A
consumer can be cancelled by the broker at any time on a channel that otherwise stays
healthy. A broker short of memory or disk stops reading what publishers send until the
alarm ends. A side that has been silent for two heartbeats is dead.

Nothing reconnects here: a dead channel or connection fails everything that waits on it, once.

Read `connection` (a life from login to farewell), then `channel` (publish, consume), then
`frames` (the bytes); `url` reads the broker's URL.
"""

from asyncflow.errors import (
    BrokerRefused,
    BrokerTimeout,
    BrokerUnreachable,
    ChannelClosed,
    ConnectionLost,
    MalformedFrame,
)
from asyncflow.transport.amqp.channel import Channel, PublishResult, QueueCounts
from asyncflow.transport.amqp.connection import Connection, connect
from asyncflow.transport.amqp.frames import Delivery, Message

__all__ = [
    "BrokerRefused",
    "BrokerTimeout",
    "BrokerUnreachable",
    "Channel",
    "ChannelClosed",
    "Connection",
    "ConnectionLost",
    "Delivery",
    "MalformedFrame",
    "Message",
    "PublishResult",
    "QueueCounts",
    "connect",
]
