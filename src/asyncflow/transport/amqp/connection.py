"""
A connection to the broker, from login to close; its channels' traffic passes through.

Three things end it: `close`, the broker (a close, a hang-up, silence for two heartbeats, bytes
that are not AMQP), or a callback of ours that raises. In each case everything that waits on the
connection or on one of its channels fails at that moment, with the same reason.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

from pamqp import base, commands
from pamqp.common import FieldTable

from asyncflow.errors import (
    BrokerRefused,
    BrokerUnreachable,
    ChannelClosed,
    ConnectionLost,
    MalformedFrame,
    TransportError,
)
from asyncflow.forking import withhold
from asyncflow.transport.amqp.calls import Calls, within
from asyncflow.transport.amqp.channel import Channel
from asyncflow.transport.amqp.frames import (
    FRAME_BYTES_MAX,
    FRAME_OVERHEAD_BYTES,
    HEARTBEAT,
    PROTOCOL_HEADER,
    Event,
    FrameReader,
    Method,
    encode_method,
)
from asyncflow.transport.amqp.url import Address, parse_url

_CHANNELS_MAX: Final = 2047
_REFUSALS: Final = (403, 530)  # access refused; not allowed, as a vhost that does not exist
_SILENT_TICKS_MAX: Final = 4
_LINGER_SECONDS: Final = 1.0


async def connect(
    url: str,
    *,
    name: str,
    heartbeat_seconds: int = 10,
    timeout_seconds: float = 5.0,
    on_blocked: Callable[[bool], None] | None = None,
) -> Connection:
    """
    Connect and log in to the broker at `url`, within `timeout_seconds`.

    Args:
        url: `amqp://user:password@host:port/vhost`, or `amqps://` for TLS; user, password
            and vhost percent-encoded, no path means the vhost `/`. With TLS the broker's
            certificate and name are verified, against the system's authorities or those
            in `?cacertfile=/path.pem`; `?verify=verify_none` verifies nothing. What else may
            stand there says `url`; it wins over the arguments.
        name: Shown for this connection by the broker's own tools.
        heartbeat_seconds: 1 or more. A silent broker is declared dead after 2 to 2.5 of these.
        timeout_seconds: For connecting, and for each later call unless it says otherwise.
        on_blocked: Called with True when the broker stops taking messages (memory or disk
            alarm), with False when it takes them again.

    Raises:
        InvalidSettings: The URL is not of this form.
        BrokerUnreachable: No answer, no AMQP, or a certificate that does not verify.
        BrokerRefused: Wrong user, password or vhost.
    """
    address = parse_url(url)
    timeout_seconds = address.timeout_seconds or timeout_seconds
    heartbeat_seconds = address.heartbeat_seconds or heartbeat_seconds
    connection = Connection(str(address), timeout_seconds=timeout_seconds, on_blocked=on_blocked)
    try:
        async with asyncio.timeout(timeout_seconds):
            await connection.open(address, name=name, heartbeat_seconds=heartbeat_seconds)
    except TimeoutError as error:
        why = f"no answer within {timeout_seconds:g} s."
        raise BrokerUnreachable(str(address), why) from error
    except ConnectionLost as error:
        raise BrokerUnreachable(str(address), error.why) from error
    except (OSError, UnicodeError) as error:  # UnicodeError: no possible host name
        raise BrokerUnreachable(str(address), str(error)) from error
    finally:
        if not connection.is_open:
            connection.abandon()
    return connection


class Connection(asyncio.Protocol):
    """
    One open connection, made by `connect`.

    `is_open` is true from login until the end, `blocked` while the broker takes no
    messages; `server` is its product and version. Methods named as asyncio.Protocol's are
    the event loop's to call.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float,
        on_blocked: Callable[[bool], None] | None,
    ) -> None:
        self.address = address
        self.server = ""
        self.is_open = False
        self.blocked = False
        self.takes_messages = asyncio.Event()
        self.takes_messages.set()
        self.timeout_seconds = timeout_seconds
        self.payload_bytes_max = FRAME_BYTES_MAX - FRAME_OVERHEAD_BYTES
        self._on_blocked = on_blocked
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._calls = Calls()
        self._channels: dict[int, Channel] = {}
        self._channels_max = _CHANNELS_MAX
        self._outgoing: list[bytes] = []
        self._writing_paused = False
        self._leaving = False
        self._reason: TransportError | None = None
        self._closed = asyncio.Event()
        self._disconnected = asyncio.Event()
        self._silent_ticks = 0
        self._ticking: asyncio.TimerHandle | None = None

    async def channel(self) -> Channel:
        """
        Open a channel.

        Raises:
            BrokerTimeout, ConnectionLost: See `Channel`.
            ChannelClosed: 504: the connection has as many channels as the broker allows.
        """
        if not self.is_open or self._leaving:
            raise self._reason or self._left()
        free = (n for n in range(1, self._channels_max + 1) if n not in self._channels)
        number = next(free, None)
        if number is None:
            raise ChannelClosed(504, f"all {self._channels_max} channels are in use.")
        channel = self._channels[number] = Channel(self, number)
        try:
            await channel.open()
        except BaseException:
            channel.abandon()
            raise
        return channel

    async def wait_closed(self) -> TransportError | None:
        """
        Wait until the connection is gone; return why, or None if this process closed it.
        """
        await self._closed.wait()
        return self._reason

    async def close(self, timeout_seconds: float = 2.0) -> None:
        """
        Flush, close the connection and disconnect.

        Never raises. A broker that does not answer costs `timeout_seconds` and one more.
        """
        if not self._leaving and not self._closed.is_set():
            self._leaving = True
            self._end_channels(self._left())
            close = commands.Connection.Close(200, "Goodbye", 0, 0)
            close_ok = self._calls.expect(commands.Connection.CloseOk)
            self.write(encode_method(0, close))
            try:
                await within(timeout_seconds, close.name, close_ok)
            except TransportError:
                pass  # A broker that does not answer is gone as well.
            finally:
                self.abandon()
        await self._disconnected.wait()

    def abandon(self) -> None:
        """
        Like `close`, immediately and without telling the broker.
        """
        self._leaving = True
        self._end(self._left())

    async def open(self, address: Address, *, name: str, heartbeat_seconds: int) -> None:
        """
        For `connect`: make the TCP connection and log in.
        """
        await self._loop.create_connection(
            lambda: self,
            address.host,
            address.port,
            ssl=address.tls,
            server_hostname=address.tls_name if address.tls else None,
        )
        start_coming = self._calls.expect(commands.Connection.Start)
        self.write(PROTOCOL_HEADER)
        start = await start_coming
        tune_coming = self._calls.expect(commands.Connection.Tune)
        self.write(encode_method(0, _start_ok(address, name)))
        tune = await tune_coming
        tune_ok = _tune_ok(tune, address, heartbeat_seconds)
        open_ok_coming = self._calls.expect(commands.Connection.OpenOk)
        self.write(encode_method(0, tune_ok))
        self.write(encode_method(0, commands.Connection.Open(address.vhost)))
        await open_ok_coming
        self.server = _product(start.server_properties)
        self.payload_bytes_max = tune_ok.frame_max - FRAME_OVERHEAD_BYTES
        self._channels_max = tune_ok.channel_max
        self.is_open = True
        self._tick(tune_ok.heartbeat)

    def write(self, frames: bytes) -> None:
        """
        For the channels: send frames, together with all others of this turn of the loop.
        """
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(frames)

    def release(self, number: int) -> None:
        """
        For the channels: free the number of a closed channel for reuse.
        """
        self._channels.pop(number, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        if (socket := transport.get_extra_info("socket")) is not None:
            withhold(self, socket.fileno())

    def data_received(self, data: bytes) -> None:
        if self._closed.is_set():
            return
        self._silent_ticks = 0
        try:
            self._take(self._reader.feed(data))
            if self._reader.failure is not None:
                raise self._reader.failure
        except MalformedFrame as error:
            self._end(ConnectionLost(self.address, str(error)))

    def pause_writing(self) -> None:
        self._writing_paused = True
        self._update_takes_messages()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._update_takes_messages()

    def connection_lost(self, exc: Exception | None) -> None:
        reason = ConnectionLost(self.address, str(exc) if exc else "the broker hung up.")
        reason.__cause__ = exc
        self._end(reason)
        self._disconnected.set()

    def _take(self, events: list[Event]) -> None:
        for event in events:
            channel = self._channels.get(event.channel)
            if channel is not None:
                channel.take(event)
            elif event.channel == 0 and isinstance(event, Method):
                self._take_method(event.method)
        for channel in tuple(self._channels.values()):
            channel.hand_over()

    def _take_method(self, method: base.Frame) -> None:
        if isinstance(method, commands.Connection.Blocked):
            self._set_blocked(True)
        elif isinstance(method, commands.Connection.Unblocked):
            self._set_blocked(False)
        elif isinstance(method, commands.Connection.Close):
            self.write(encode_method(0, commands.Connection.CloseOk()))
            self._end(self._farewell(method.reply_code or 0, method.reply_text))
        else:
            self._calls.answer(method)

    def _farewell(self, code: int, text: str) -> TransportError:
        if code in _REFUSALS:
            return BrokerRefused(self.address, code, text)
        return ConnectionLost(self.address, f"{code} {text}")

    def _left(self) -> ConnectionLost:
        return ConnectionLost(self.address, "this process closed it.")

    def _set_blocked(self, blocked: bool) -> None:
        self.blocked = blocked
        self._update_takes_messages()
        if self._on_blocked is not None:
            self._on_blocked(blocked)

    def _update_takes_messages(self) -> None:
        if self.blocked or self._writing_paused:
            self.takes_messages.clear()
        else:
            self.takes_messages.set()

    def _flush(self) -> None:
        if self._outgoing and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._outgoing))
        self._outgoing.clear()

    def _tick(self, heartbeat_seconds: int) -> None:
        # Count ticks, not seconds: if this process itself stood still, the broker's bytes lie
        # unread in the socket, and one late tick must not end the connection.
        if self._silent_ticks >= _SILENT_TICKS_MAX:
            silence = f"the broker was silent for {2 * heartbeat_seconds} s."
            self._end(ConnectionLost(self.address, silence))
            return
        self._silent_ticks += 1
        self.write(HEARTBEAT)
        self._ticking = self._loop.call_later(heartbeat_seconds / 2, self._tick, heartbeat_seconds)

    def _end(self, reason: TransportError) -> None:
        if self._closed.is_set():
            return
        self.is_open = False
        self._reason = None if self._leaving else reason
        self._closed.set()
        self._calls.fail(reason)
        self._end_channels(reason)
        self.takes_messages.set()
        if self._ticking is not None:
            self._ticking.cancel()
        self._disconnect()

    def _end_channels(self, reason: TransportError) -> None:
        for channel in self._channels.values():
            channel.end(reason)
        self._channels.clear()

    def _disconnect(self) -> None:
        if self._transport is None:
            self._disconnected.set()
            return
        self._flush()
        self._transport.close()
        # A frozen broker never takes the last bytes; they would keep the socket open.
        self._loop.call_later(_LINGER_SECONDS, self._transport.abort)


def _start_ok(address: Address, name: str) -> commands.Connection.StartOk:
    capabilities: FieldTable = {
        "authentication_failure_close": True,
        "basic.nack": True,
        "connection.blocked": True,
        "consumer_cancel_notify": True,
        "publisher_confirms": True,
    }
    return commands.Connection.StartOk(
        client_properties={
            "connection_name": name,
            "product": "AsyncFlow",
            "capabilities": capabilities,
        },
        mechanism="PLAIN",
        response=f"\0{address.user}\0{address.password}",
    )


def _tune_ok(
    tune: commands.Connection.Tune, address: Address, heartbeat_seconds: int
) -> commands.Connection.TuneOk:
    """
    Agree on the smaller of both sides' limits, where 0 means no limit.
    """
    channels_max = min(_CHANNELS_MAX, address.channels_max or _CHANNELS_MAX)
    frame_bytes_max = min(FRAME_BYTES_MAX, address.frame_bytes_max or FRAME_BYTES_MAX)
    return commands.Connection.TuneOk(
        channel_max=min(tune.channel_max or channels_max, channels_max),
        frame_max=min(tune.frame_max or frame_bytes_max, frame_bytes_max),
        heartbeat=min(tune.heartbeat or heartbeat_seconds, heartbeat_seconds),
    )


def _product(properties: FieldTable) -> str:
    return " ".join(str(properties.get(key, "?")) for key in ("product", "version"))
