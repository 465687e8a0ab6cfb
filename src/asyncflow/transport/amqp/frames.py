"""
The bytes of AMQP 0-9-1: frames in, events out; messages in, frames out. No I/O.

A frame is kind (1 byte), channel (2), payload size (4), the payload and the byte 0xCE.
A *method* frame carries one call or reply. Three methods carry content (publish, deliver,
return): a *header* frame with the body's size and the properties follows, then as many
*body* frames as the size needs, none for an empty body. Frames of different channels may
alternate, frames of one channel never do; TCP may cut the stream anywhere.

Deliveries, confirms, publishes and acks are the traffic, so they are packed and unpacked
by hand, a buffer at a time: an order of magnitude cheaper than an object per frame.
Everything else is rare and left to pamqp.

What a frame means is decided in `connection` and `channel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from struct import Struct
from struct import error as StructError
from typing import Final, TypeAlias

from pamqp import base, commands, encode, header
from pamqp import frame as pamqp_frame
from pamqp.common import FieldTable, FieldValue

from asyncflow.errors import MalformedFrame

PROTOCOL_HEADER: Final = b"AMQP\x00\x00\x09\x01"
HEARTBEAT: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"
FRAME_BYTES_MAX: Final = 131_072
FRAME_OVERHEAD_BYTES: Final = 8
BODY_BYTES_MAX: Final = 65_536

_METHOD: Final = 1
_HEADER: Final = 2
_BODY: Final = 3
_HEARTBEAT: Final = 8
_FRAME_END: Final = b"\xce"
_FRAME_END_BYTE: Final = 0xCE

_BASIC_DELIVER: Final = b"\x00\x3c\x00\x3c"
_BASIC_RETURN: Final = b"\x00\x3c\x00\x32"
_BASIC_ACK: Final = b"\x00\x3c\x00\x50"
_BASIC_NACK: Final = b"\x00\x3c\x00\x78"

_HAS_HEADERS: Final = 0x2000
_HAS_DELIVERY_MODE: Final = 0x1000
_HAS_PRIORITY: Final = 0x0800
_HAS_MESSAGE_ID: Final = 0x0080
_PERSISTENT: Final = b"\x02"
_MANDATORY: Final = b"\x01"

_FRAME_HEAD: Final = Struct(">BHI")
_TAG_AND_FLAGS: Final = Struct(">QB")
_TAG_AND_REDELIVERED: Final = Struct(">Q?")
_CONTENT_HEAD: Final = Struct(">HHQ")
_CONTENT_FRAME_HEAD: Final = Struct(">BHIHHQH")
_ACKNOWLEDGEMENT: Final = Struct(">BHI4sQBB")


@dataclass(slots=True)
class Message:
    """
    One message to publish, persistent and mandatory.

    `priority` is 0 … 255 (the queue decides what it distinguishes), None for the
    queue's default.
    """

    routing_key: str
    body: bytes
    priority: int | None = None
    headers: Mapping[str, FieldValue] | None = None


class Delivery:
    """
    One message that the broker handed to a consumer, to be acknowledged by `tag`.

    `tag` is valid only on the channel it came from. `body` is None if it was larger
    than `BODY_BYTES_MAX`; nothing of it was kept.
    """

    __slots__ = (
        "_properties",
        "body",
        "channel",
        "consumer_tag",
        "redelivered",
        "routing_key",
        "tag",
    )

    def __init__(self, channel: int, arguments: bytes, properties: bytes, body: bytes | None):
        tag_at = 1 + arguments[0]
        exchange_at = tag_at + _TAG_AND_REDELIVERED.size
        key_at = exchange_at + 1 + arguments[exchange_at]
        self.channel = channel
        self.consumer_tag = str(arguments[1:tag_at], "utf-8", "replace")
        tag, redelivered = _TAG_AND_REDELIVERED.unpack_from(arguments, tag_at)
        self.tag: int = tag
        self.redelivered: bool = redelivered
        self.routing_key = str(
            arguments[key_at + 1 : key_at + 1 + arguments[key_at]], "utf-8", "replace"
        )
        self.body = body
        self._properties = properties

    @property
    def headers(self) -> FieldTable:
        """
        The message's header table, decoded at each call; {} if it has none.

        Raises:
            MalformedFrame: The publisher's table cannot be decoded.
        """
        return _decode_properties(self._properties).headers or {}


@dataclass(slots=True)
class Returned:
    """
    A published message that no queue wanted; its confirm follows.

    `message_id` is the one it was published with, "" if none.
    """

    channel: int
    message_id: str


@dataclass(slots=True)
class Confirm:
    """
    The broker's answer to the publish number `tag`, or to all up to it if `multiple`.
    """

    channel: int
    tag: int
    multiple: bool
    accepted: bool


@dataclass(slots=True)
class Method:
    """
    Any other call or reply of the peer.
    """

    channel: int
    method: base.Frame


Event: TypeAlias = Delivery | Returned | Confirm | Method


class _Content:
    """
    A delivery or return whose header or body is still arriving.
    """

    __slots__ = ("arguments", "bytes_missing", "chunks", "is_return", "properties")

    def __init__(self, arguments: bytes, is_return: bool):
        self.arguments = arguments
        self.is_return = is_return
        self.properties = b""
        self.bytes_missing: int | None = None
        self.chunks: list[bytes] | None = []


class FrameReader:
    """
    Cuts a byte stream into events; where the stream is cut into buffers makes no difference.

    After the first malformed frame `failure` is set and everything later is ignored.
    """

    def __init__(self) -> None:
        self.failure: MalformedFrame | None = None
        self._chunks: list[bytes] = []
        self._bytes_held = 0
        self._bytes_wanted = FRAME_OVERHEAD_BYTES
        self._contents: dict[int, _Content] = {}
        self._events: list[Event] = []

    def feed(self, data: bytes) -> list[Event]:
        """
        Take the next bytes and return the events they complete, in their order.
        """
        if self.failure is not None:
            return []
        self._chunks.append(data)
        self._bytes_held += len(data)
        if self._bytes_held < self._bytes_wanted:
            return []
        buffer = b"".join(self._chunks) if len(self._chunks) > 1 else data
        self._events = []
        try:
            rest = buffer[self._read_frames(buffer) :]
        except MalformedFrame as error:
            self.failure = error
            rest = b""
        self._chunks = [rest] if rest else []
        self._bytes_held = len(rest)
        return self._events

    def _read_frames(self, buffer: bytes) -> int:
        position, end = 0, len(buffer)
        while end - position >= FRAME_OVERHEAD_BYTES:
            kind, channel, size = _FRAME_HEAD.unpack_from(buffer, position)
            if size > FRAME_BYTES_MAX - FRAME_OVERHEAD_BYTES:
                raise MalformedFrame(f"A frame of {size} bytes is larger than was agreed.")
            start = position + _FRAME_HEAD.size
            stop = start + size
            if stop >= end:
                self._bytes_wanted = stop + 1 - position
                return position
            if buffer[stop] != _FRAME_END_BYTE:
                raise MalformedFrame("A frame does not end where it says.")
            if kind == _BODY:
                self._read_body(channel, buffer[start:stop])
            elif kind == _HEADER:
                self._read_header(channel, buffer[start:stop])
            elif kind == _METHOD:
                self._read_method(channel, buffer[start:stop])
            elif kind != _HEARTBEAT:
                raise MalformedFrame(f"Unknown frame type {kind}.")
            position = stop + 1
        self._bytes_wanted = FRAME_OVERHEAD_BYTES
        return position

    def _read_method(self, channel: int, payload: bytes) -> None:
        method = payload[:4]
        if method == _BASIC_DELIVER or method == _BASIC_RETURN:
            self._contents[channel] = _Content(payload[4:], is_return=method == _BASIC_RETURN)
        elif method == _BASIC_ACK or method == _BASIC_NACK:
            if len(payload) != 4 + _TAG_AND_FLAGS.size:
                raise MalformedFrame("A confirm has the wrong size.")
            tag, flags = _TAG_AND_FLAGS.unpack_from(payload, 4)
            confirm = Confirm(channel, tag, bool(flags & 1), method == _BASIC_ACK)
            self._events.append(confirm)
        else:
            self._events.append(Method(channel, _decode_method(payload)))

    def _read_header(self, channel: int, payload: bytes) -> None:
        content = self._contents.get(channel)
        if content is None or content.bytes_missing is not None:
            raise MalformedFrame("A content header follows no delivery.")
        if len(payload) < _CONTENT_HEAD.size + 2:
            raise MalformedFrame("A content header is too short.")
        _, _, body_bytes = _CONTENT_HEAD.unpack_from(payload)
        content.properties = payload
        content.bytes_missing = body_bytes
        if body_bytes > BODY_BYTES_MAX:
            content.chunks = None
        if body_bytes == 0:
            self._finish(channel, content)

    def _read_body(self, channel: int, payload: bytes) -> None:
        content = self._contents.get(channel)
        if content is None or content.bytes_missing is None:
            raise MalformedFrame("A body follows no content header.")
        content.bytes_missing -= len(payload)
        if content.chunks is not None:
            content.chunks.append(payload)
        if content.bytes_missing == 0:
            self._finish(channel, content)
        elif content.bytes_missing < 0:
            raise MalformedFrame("A body is longer than its header says.")

    def _finish(self, channel: int, content: _Content) -> None:
        del self._contents[channel]
        if content.is_return:
            message_id = _decode_properties(content.properties).message_id or ""
            self._events.append(Returned(channel, message_id))
            return
        chunks = content.chunks
        body = None if chunks is None else chunks[0] if len(chunks) == 1 else b"".join(chunks)
        try:
            delivery = Delivery(channel, content.arguments, content.properties, body)
        except (IndexError, StructError) as error:
            raise MalformedFrame("A delivery's arguments are cut short.") from error
        self._events.append(delivery)


def encode_publish(
    message: Message, *, channel: int, exchange: str, sequence: int, payload_bytes_max: int
) -> bytes:
    """
    The frames of one publish, with `sequence` as its message id.

    The broker repeats the message id in a return, which has no number of its own.

    Raises:
        ValueError: The routing key or exchange is longer than 255 bytes of UTF-8, or
            the priority outside 0 … 255.
        TypeError: A header is of a type that AMQP does not know.
    """
    flags = _HAS_DELIVERY_MODE | _HAS_MESSAGE_ID
    message_id = b"%d" % sequence
    properties = _PERSISTENT
    if message.priority is not None:
        flags |= _HAS_PRIORITY
        properties += bytes((message.priority,))
    properties += bytes((len(message_id),)) + message_id
    if message.headers:
        flags |= _HAS_HEADERS
        properties = encode.field_table(dict(message.headers)) + properties
    body = message.body
    head = _CONTENT_FRAME_HEAD.pack(
        _HEADER, channel, _CONTENT_HEAD.size + 2 + len(properties), 60, 0, len(body), flags
    )
    method = _encode_publish_method(channel, exchange, message.routing_key)
    if len(body) <= payload_bytes_max:
        return method + head + properties + _FRAME_END + _encode_body(channel, body)
    parts = (
        _encode_body(channel, body[start : start + payload_bytes_max])
        for start in range(0, len(body), payload_bytes_max)
    )
    return method + head + properties + _FRAME_END + b"".join(parts)


@lru_cache(maxsize=1024)
def _encode_publish_method(channel: int, exchange: str, routing_key: str) -> bytes:
    reserved = b"\x00\x00"
    names = _encode_short_string(exchange) + _encode_short_string(routing_key)
    payload = b"\x00\x3c\x00\x28" + reserved + names + _MANDATORY
    return _FRAME_HEAD.pack(_METHOD, channel, len(payload)) + payload + _FRAME_END


def _encode_short_string(text: str) -> bytes:
    raw = text.encode()
    if len(raw) > 255:
        raise ValueError(f"{text[:40]!r}… has {len(raw)} bytes; AMQP names have at most 255.")
    return bytes((len(raw),)) + raw


def _encode_body(channel: int, part: bytes) -> bytes:
    if not part:
        return b""
    return _FRAME_HEAD.pack(_BODY, channel, len(part)) + part + _FRAME_END


def encode_ack(channel: int, tag: int, *, multiple: bool) -> bytes:
    """
    The frame that acknowledges delivery `tag`, and all before it if `multiple`.
    """
    return _ACKNOWLEDGEMENT.pack(_METHOD, channel, 13, _BASIC_ACK, tag, multiple, _FRAME_END_BYTE)


def encode_nack(channel: int, tag: int, *, multiple: bool, requeue: bool) -> bytes:
    """
    The frame that gives delivery `tag` back to its queue, or to its dead-letter exchange.
    """
    flags = multiple | requeue << 1
    return _ACKNOWLEDGEMENT.pack(_METHOD, channel, 13, _BASIC_NACK, tag, flags, _FRAME_END_BYTE)


def encode_method(channel: int, method: base.Frame) -> bytes:
    """
    The frame of any other method.
    """
    return pamqp_frame.marshal(method, channel)


def _decode_method(payload: bytes) -> base.Frame:
    # pamqp answers broken bytes with whatever its own code ran into: struct.error,
    # IndexError, KeyError, UnicodeDecodeError, RecursionError.
    try:
        method: base.Frame = commands.INDEX_MAPPING[int.from_bytes(payload[:4], "big")]()
        method.unmarshal(payload[4:])
    except Exception as error:
        raise MalformedFrame("A method frame cannot be decoded.") from error
    return method


def _decode_properties(payload: bytes) -> commands.Basic.Properties:
    content_header = header.ContentHeader()
    try:
        content_header.unmarshal(payload)
    except Exception as error:
        raise MalformedFrame("A message's properties cannot be decoded.") from error
    return content_header.properties
