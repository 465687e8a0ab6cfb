"""
Guarantees of AMQP framing: a stream means the same however it is cut, and no bytes can do harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, frame, header, heartbeat

from asyncflow.errors import TransportError
from asyncflow.transport.amqp import Channel, Connection, Delivery, MalformedFrame, Message
from asyncflow.transport.amqp.frames import (
    BODY_BYTES_MAX,
    FRAME_BYTES_MAX,
    FrameReader,
    Method,
    encode_ack,
    encode_nack,
    encode_publish,
)

names = st.text(max_size=5)
tags = st.integers(0, 9) | st.integers(0, 2**63 - 1)  # pamqp supports no higher ones
channels = st.integers(1, 3)
headers = st.dictionaries(names, names | st.booleans(), max_size=3)
properties = st.builds(
    commands.Basic.Properties,
    headers=headers,
    priority=st.integers(0, 255),
    message_id=st.just("1") | names,
)
deliver = st.builds(
    commands.Basic.Deliver,
    consumer_tag=st.just("1.1") | names,
    delivery_tag=tags,
    redelivered=st.booleans(),
    routing_key=names,
)
returned = st.builds(commands.Basic.Return, reply_code=st.just(312), routing_key=names)
rare_methods = st.sampled_from(
    [
        commands.Channel.CloseOk(),
        commands.Channel.Close(404, "NOT_FOUND", 60, 40),
        commands.Basic.Cancel("1.1"),
        commands.Basic.ConsumeOk("1.1"),
        commands.Queue.DeclareOk("q", 1, 2),
        commands.Connection.Blocked("low on memory"),
        commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0),
    ]
)


@st.composite
def content(draw: st.DrawFn) -> bytes:
    """
    A delivery or return whose body spans any number of frames.
    """
    channel = draw(channels)
    parts = draw(st.lists(st.binary(min_size=1, max_size=30), max_size=3))
    head = header.ContentHeader(0, sum(map(len, parts)), draw(properties))
    frames = [draw(deliver | returned), head, *map(body.ContentBody, parts)]
    return b"".join(frame.marshal(each, channel) for each in frames)


@st.composite
def other_frame(draw: st.DrawFn) -> bytes:
    """
    A confirm, a rare method or a heartbeat.
    """
    confirm = st.builds(commands.Basic.Ack, delivery_tag=tags, multiple=st.booleans())
    refusal = st.builds(commands.Basic.Nack, delivery_tag=tags, multiple=st.booleans())
    choice = draw(confirm | refusal | rare_methods | st.just(heartbeat.Heartbeat()))
    return frame.marshal(choice, draw(channels | st.just(0)))


streams = st.lists(content() | other_frame(), max_size=6).map(b"".join)


def plain(event: object) -> Any:
    """
    An event as comparable values.
    """
    if isinstance(event, Delivery):
        fields = ("channel", "consumer_tag", "tag", "redelivered", "routing_key", "body")
        return [getattr(event, name) for name in fields], event.headers
    if isinstance(event, Method):
        return event.channel, event.method.name, dict(event.method)
    return event


def events_of(*buffers: bytes) -> list[Any]:
    """
    The events that a reader sees in a stream that arrives in these buffers, and how it ended.
    """
    reader = FrameReader()
    events = [plain(event) for buffer in buffers for event in reader.feed(buffer)]
    return [*events, str(reader.failure)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """
    The stream in pieces; a place beyond its end, or a repeated one, makes an empty piece.
    """
    edges = [0, *sorted(places), len(stream)]
    return [stream[start:stop] for start, stop in pairwise(edges)]


@given(stream=streams, places=st.lists(st.integers(0, 400), max_size=12))
def test_a_stream_cut_anywhere_gives_the_same_events(stream: bytes, places: list[int]) -> None:
    """
    The way TCP splits a stream does not change its events.
    """
    assert events_of(stream) == events_of(*cut(stream, places))


@given(stream=streams)
def test_a_stream_arriving_byte_by_byte_gives_the_same_events(stream: bytes) -> None:
    """
    A stream that arrives byte by byte gives the same events.
    """
    assert events_of(stream) == events_of(*(bytes((byte,)) for byte in stream))


@given(
    stream=streams,
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    places=st.lists(st.integers(0, 400), max_size=4),
)
def test_a_damaged_stream_fails_at_the_same_event_however_it_is_cut(
    stream: bytes, damage: list[tuple[int, int]], places: list[int]
) -> None:
    """
    Damage raises at most a MalformedFrame, and never changes the events before it.
    """
    damaged = damage_of(stream, damage)

    try:
        expected = events_of(damaged)
    except MalformedFrame:
        return  # A damaged header table, which only fails when read.
    assert expected == events_of(*cut(damaged, places))


@given(noise=st.binary(max_size=300))
def test_noise_is_never_more_than_a_malformed_frame(noise: bytes) -> None:
    """
    Bytes that are not AMQP cause at most a MalformedFrame, and nothing is read after them.
    """
    reader = FrameReader()
    reader.feed(noise)

    if reader.failure is not None:
        assert [] == reader.feed(frame.marshal(commands.Channel.CloseOk(), 1))


@given(
    stream=streams | st.binary(max_size=300),
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
)
def test_whatever_a_broker_sends_a_connection_survives_it_or_is_lost(
    stream: bytes, damage: list[tuple[int, int]]
) -> None:
    """
    No bytes from the peer raise in the event loop; the connection survives them or is lost.
    """
    asyncio.run(receive(damage_of(stream, damage)))


async def receive(stream: bytes) -> None:
    """
    Feed a stream to an open connection with a consumer and a publish in flight.
    """
    connection = Connection("far side", timeout_seconds=1, on_blocked=None)
    connection.connection_made(FarSide())
    connection.is_open = True
    channel = await opened(connection)
    waiting = [
        asyncio.ensure_future(
            channel.consume("q", prefetch=1, on_deliveries=list.clear, on_cancelled=lambda: None)
        ),
        asyncio.ensure_future(
            channel.publish([Message("q", b"x")], exchange="", timeout_seconds=1)
        ),
    ]
    await asyncio.sleep(0)
    connection.data_received(stream)
    connection.abandon()
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert not isinstance(outcome, BaseException) or isinstance(outcome, TransportError)


async def opened(connection: Connection) -> Channel:
    """
    A channel in confirm mode on a connection whose peer only listens.
    """
    opening = asyncio.ensure_future(connection.channel())
    await asyncio.sleep(0)
    connection.data_received(frame.marshal(commands.Channel.OpenOk(), 1))
    channel = await opening
    selecting = asyncio.ensure_future(channel.confirm_select())
    await asyncio.sleep(0)
    connection.data_received(frame.marshal(commands.Confirm.SelectOk(), 1))
    await selecting
    return channel


class FarSide(asyncio.Transport):
    """
    A transport whose peer never answers.
    """

    def write(self, data: object) -> None:
        """
        Discard the bytes.
        """

    def is_closing(self) -> bool:
        """
        Never.
        """
        return False

    def close(self) -> None:
        """
        Do nothing.
        """

    abort = close


def damage_of(stream: bytes, damage: list[tuple[int, int]]) -> bytes:
    """
    The stream with some of its bytes replaced.
    """
    damaged = bytearray(stream)
    for place, byte in damage:
        if place < len(damaged):
            damaged[place] = byte
    return bytes(damaged)


@given(
    routing_key=names,
    payload=st.binary(max_size=300),
    priority=st.none() | st.integers(0, 255),
    table=headers,
    sequence=st.integers(1, 2**63),
    part_bytes=st.integers(1, 100),
)
def test_a_publish_says_what_was_asked(
    routing_key: str,
    payload: bytes,
    priority: int | None,
    table: dict[str, Any],
    sequence: int,
    part_bytes: int,
) -> None:
    """
    An independent decoder reads a published message back: persistent, mandatory, in frames within
    the limit.
    """
    raw = encode_publish(
        Message(routing_key, payload, priority, table),
        channel=7,
        exchange="x",
        sequence=sequence,
        payload_bytes_max=part_bytes,
    )

    publish, head, *parts = decoded(raw, channel=7)
    assert (publish.exchange, publish.routing_key, publish.mandatory) == ("x", routing_key, True)
    assert head.body_size == len(payload)
    assert 2 == head.properties.delivery_mode
    assert head.properties.message_id == str(sequence)
    assert head.properties.priority == priority
    assert (head.properties.headers or {}) == table
    assert all(len(part.value) <= part_bytes for part in parts)
    assert b"".join(part.value for part in parts) == payload


def decoded(raw: bytes, *, channel: int) -> list[Any]:
    """
    The frames in `raw`, all of one channel, as pamqp reads them.
    """
    frames = []
    while raw:
        size, number, each = frame.unmarshal(raw)
        assert number == channel
        frames.append(each)
        raw = raw[size:]
    return frames


@given(tag=tags, multiple=st.booleans(), requeue=st.booleans())
def test_an_ack_and_a_nack_say_what_was_asked(tag: int, multiple: bool, requeue: bool) -> None:
    """
    An independent decoder reads the acknowledgements back.
    """
    (ack,) = decoded(encode_ack(3, tag, multiple=multiple), channel=3)
    (nack,) = decoded(encode_nack(3, tag, multiple=multiple, requeue=requeue), channel=3)

    assert (ack.name, ack.delivery_tag, ack.multiple) == ("Basic.Ack", tag, multiple)
    assert (nack.name, nack.delivery_tag) == ("Basic.Nack", tag)
    assert (nack.multiple, nack.requeue) == (multiple, requeue)


def test_messages_of_two_channels_may_alternate_frame_by_frame() -> None:
    """
    Frames of two channels may alternate; each channel's content is assembled separately.
    """
    frames = [
        frame.marshal(commands.Basic.Deliver("a", 1, False, "", "k"), 1),
        frame.marshal(commands.Basic.Deliver("b", 9, True, "", "k"), 2),
        frame.marshal(header.ContentHeader(0, 4), 2),
        frame.marshal(header.ContentHeader(0, 2), 1),
        frame.marshal(body.ContentBody(b"wo"), 2),
        frame.marshal(body.ContentBody(b"hi"), 1),
        frame.marshal(body.ContentBody(b"rd"), 2),
    ]

    events = FrameReader().feed(b"".join(frames))

    assert [(1, b"hi"), (2, b"word")] == [
        (event.channel, event.body) for event in events if isinstance(event, Delivery)
    ]


def frames_of(*frames: Any) -> bytes:
    """
    Frames of channel 1.
    """
    return b"".join(frame.marshal(each, 1) for each in frames)


@pytest.mark.parametrize(("size", "is_kept"), [(BODY_BYTES_MAX, True), (BODY_BYTES_MAX + 1, False)])
def test_a_body_that_is_too_large_is_delivered_without_it(size: int, is_kept: bool) -> None:
    """
    A huge message arrives as a delivery without a body, so it cannot exhaust a worker's memory.
    """
    stream = frames_of(
        commands.Basic.Deliver("a", 1, False, "", "k"),
        header.ContentHeader(0, size),
        body.ContentBody(b"x" * (size - 1)),
        body.ContentBody(b"x"),
    )

    events = FrameReader().feed(stream)

    (delivery,) = events
    assert isinstance(delivery, Delivery)
    assert delivery.body == (b"x" * size if is_kept else None)


IMPOSSIBLE: dict[str, Callable[[], bytes]] = {
    "a frame larger than agreed": lambda: (
        b"\x03\x00\x01" + FRAME_BYTES_MAX.to_bytes(4, "big") + b"x"
    ),
    "a frame without its end": lambda: b"\x08\x00\x00\x00\x00\x00\x00\x00",
    "another protocol": lambda: b"AMQP\x00\x01\x00\x00",
    "a body of no message": lambda: frames_of(body.ContentBody(b"x")),
    "a header of no message": lambda: frames_of(header.ContentHeader(0, 1)),
    "a body longer than announced": lambda: frames_of(
        commands.Basic.Deliver("a", 1, False, "", "k"),
        header.ContentHeader(0, 1),
        body.ContentBody(b"xx"),
    ),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_what_cannot_be_amqp_is_a_malformed_frame(what: str) -> None:
    """
    The reader stops with a MalformedFrame, rather than guess or wait for bytes that never come.
    """
    reader = FrameReader()

    assert [] == reader.feed(IMPOSSIBLE[what]())
    assert isinstance(reader.failure, MalformedFrame)


def test_a_name_that_amqp_cannot_carry_is_refused_before_anything_is_sent() -> None:
    """
    A routing key of more than 255 bytes is refused, since it would be misread.
    """
    with pytest.raises(ValueError, match="at most 255"):
        encode_publish(
            Message("é" * 128, b""), channel=1, exchange="", sequence=1, payload_bytes_max=100
        )
