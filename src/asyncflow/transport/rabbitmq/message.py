"""
A message between relay and worker: one hint, or a pack of hints.

The body holds task ids and nothing else. A worker acknowledges a message once every hint of it is
used up, or gives the whole message back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeAlias
from uuid import UUID

from asyncpg.pgproto import pgproto

from asyncflow.transport.amqp import Channel

PACK_MAX = 50
"""Most hints in one message; together they cost RabbitMQ and both ends as much as one hint."""

_BODY_BYTES_MAX = PACK_MAX * len("01a20cb2-c821-712a-9253-242be15a5023\n") - 1


def encode_hints(task_ids: Sequence[UUID]) -> bytes:
    """
    The body of a message: the ids as text, one per line, so that a person can read it.

    Args:
        task_ids: 1 to `PACK_MAX` of them.
    """
    return "\n".join(map(str, task_ids)).encode()


def decode_hints(body: bytes | None) -> list[UUID] | None:
    """
    The task ids in a body, or None unless it is 1 to `PACK_MAX` lines of one id each.

    One bad line spoils the message: a person should see it as it arrived. If another line is the
    id of a task, the relay notices that its hint was lost.
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


class Pack:
    """
    A delivered message until it is acknowledged or given back, which happens once.

    It keeps its channel, because a delivery tag means nothing on another one.

    Attributes:
        arrived: When it was delivered, in seconds of the monotonic clock.
    """

    __slots__ = ("_channel", "_tag", "_unsettled", "arrived")

    def __init__(self, channel: Channel, tag: int, *, hints: int) -> None:
        self._channel = channel
        self._tag = tag
        self._unsettled = hints
        self.arrived = time.monotonic()

    def settle_one(self) -> None:
        """
        Use up one of its hints; with the last one, acknowledge the message.
        """
        self._unsettled -= 1
        if self._unsettled == 0:
            self._channel.ack(self._tag)

    def settle(self) -> None:
        """
        Use up all of its hints.
        """
        if self._unsettled > 0:
            self._unsettled = 0
            self._channel.ack(self._tag)

    def give_back(self) -> None:
        """
        Let another worker have the message, whatever is running of it here.
        """
        if self._unsettled > 0:
            self._unsettled = 0
            self._channel.nack(self._tag, requeue=True)


Hint: TypeAlias = tuple[UUID, Pack]
"""A task id, and the message it came in."""
