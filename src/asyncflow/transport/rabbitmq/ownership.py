"""
One installation owns the names in RabbitMQ that begin with a prefix.

Two installations that shared them would take each other's hints for those of deleted tasks. So
the first one declares a marker queue with its identity as an argument, and RabbitMQ refuses the
declaration of another. The queue vanishes after `OWNED_SECONDS` without use.
"""

from __future__ import annotations

from collections.abc import Callable

from asyncflow.store.database import Executor
from asyncflow.store.installation import identity
from asyncflow.transport.amqp import Channel
from asyncflow.transport.amqp.channel import Arguments
from asyncflow.transport.rabbitmq.topology import PREFIX, marker_queue, unreadable

OWNED_SECONDS = 600.0
"""
Longer than a deployment, so that no other installation takes the names meanwhile; see
docs/internals/decisions.md.
"""


class Ownership:
    """
    Claims the names for the installation of one database.

    Args:
        owned_seconds: How long a claim outlives the last channel that held it; the same for all
            processes of an installation, since it is an argument of the marker queue.
    """

    def __init__(
        self, db: Executor, *, prefix: str = PREFIX, owned_seconds: float = OWNED_SECONDS
    ) -> None:
        self._db = db
        self._prefix = prefix
        self._owned_seconds = owned_seconds
        self._installation: str | None = None

    async def claim(self, channel: Channel, *, on_lost: Callable[[], None]) -> None:
        """
        Make sure that no other installation uses the names while `channel` is open.

        Does nothing where PostgreSQL does not tell which installation this is. See `own`.
        """
        # Asked once: a worker connects to RabbitMQ again also while PostgreSQL is away.
        self._installation = self._installation or await identity(self._db)
        if self._installation is not None:
            await own(
                channel,
                installation=self._installation,
                prefix=self._prefix,
                owned_seconds=self._owned_seconds,
                on_lost=on_lost,
            )


async def own(
    channel: Channel,
    *,
    installation: str,
    on_lost: Callable[[], None],
    prefix: str = PREFIX,
    owned_seconds: float = OWNED_SECONDS,
) -> None:
    """
    Declare that the names belong to `installation`, and hold that while the channel is open.

    Args:
        on_lost: Called when the marker queue was deleted. The next to declare it owns the names,
            so connect again.

    Raises:
        ChannelClosed: 406: the names belong to another installation; `diagnosis` names it.
    """
    arguments: Arguments = {
        "x-queue-type": "quorum",
        "x-expires": int(owned_seconds * 1_000),
        "x-dead-letter-exchange": unreadable(prefix),
        # Of all arguments that RabbitMQ compares, the one that may hold any text.
        "x-dead-letter-routing-key": installation,
    }
    queue = marker_queue(prefix)
    await channel.declare_queue(queue, arguments=arguments)
    await channel.consume(
        queue,
        prefetch=1,
        # Nothing of ours is sent there.
        on_deliveries=lambda deliveries: channel.ack(deliveries[0].tag),
        on_cancelled=on_lost,
    )
