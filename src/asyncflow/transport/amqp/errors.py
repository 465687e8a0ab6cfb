"""
What can go wrong between AsyncFlow and RabbitMQ.

    TransportError
    ├── BrokerUnreachable   no AMQP connection could be made
    ├── BrokerRefused       user, password, virtual host or permission is wrong
    ├── BrokerTimeout       a call was not answered in time; its effect is unknown
    ├── ConnectionLost      the connection is gone, and all its channels with it
    ├── ChannelClosed       one channel is gone, with the broker's code and text
    └── MalformedFrame      bytes that are not AMQP

No message contains the broker's URL: it holds a password.
"""

from __future__ import annotations

from asyncflow.errors import TransportError


class BrokerUnreachable(TransportError):
    """
    No AMQP connection could be made to this address; a later try may succeed.
    """

    def __init__(self, address: str, why: str) -> None:
        self.address = address
        self.why = why
        super().__init__(f"RabbitMQ at {address} cannot be reached: {why}")


class BrokerRefused(TransportError):
    """
    The broker is there but does not let us in; only a change of settings will help.
    """

    def __init__(self, address: str, code: int, text: str) -> None:
        self.address = address
        self.code = code
        self.text = text
        super().__init__(f"RabbitMQ at {address} refused the connection: {code} {text}")


class BrokerTimeout(TransportError):
    """
    A call was not answered in time; whether it took effect is unknown.
    """

    def __init__(self, call: str, seconds: float) -> None:
        self.call = call
        self.seconds = seconds
        super().__init__(f"RabbitMQ did not answer {call} within {seconds:g} s.")


class ConnectionLost(TransportError):
    """
    The connection is gone, and every channel of it.
    """

    def __init__(self, address: str, why: str) -> None:
        self.address = address
        self.why = why
        super().__init__(f"The connection to RabbitMQ at {address} is gone: {why}")


class ChannelClosed(TransportError):
    """
    The channel is gone, the connection is not. Its unacknowledged deliveries are requeued.

    `code` is the broker's (403 not allowed, 404 no such queue or exchange, 405 locked,
    406 precondition failed), or 200 if this process closed the channel.
    """

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(f"The AMQP channel is closed: {code} {text}")


class MalformedFrame(TransportError):
    """
    Bytes that are not AMQP, or AMQP that nobody asked for.

    Ends as `ConnectionLost`, except where a caller asks for one message's headers.
    """
