"""
A RabbitMQ administered by others: a dedicated user in a virtual host, whose permissions come and
go, and a relay and a worker that log in as this user.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from structlog.testing import capture_logs

from asyncflow.relay import times as relay_times
from asyncflow.relay.relay import Relay
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.transport import Claimant
from asyncflow.transport.rabbitmq import transport as rabbitmq
from asyncflow.transport.rabbitmq.ownership import OWNED_SECONDS
from asyncflow.transport.rabbitmq.queue_backoff import BackoffTimes
from asyncflow.transport.rabbitmq.topology import PREFIX
from asyncflow.transport.rabbitmq.transport import RabbitTransport
from tests.support.broker import Broker
from tests.support.tasks import NAME, QUEUE, a_worker, complete, until

PASSWORD = "secret-of-a-test"
EVERYTHING = ".*"
NOTHING = "^$"


class Administrator:
    """
    Grants and revokes permissions in one virtual host.

    Attributes:
        url: The AMQP URL for logging in as the user.
    """

    def __init__(self, broker: Broker, broker_url: str) -> None:
        parts = urlsplit(broker_url)
        self.broker = broker
        self.vhost = parts.path[1:]
        self.user = f"user-of-{self.vhost}"
        self.url = parts._replace(
            netloc=f"{self.user}:{PASSWORD}@{parts.hostname}:{parts.port}"
        ).geturl()

    async def api(self, method: str, path: str, body: Any = None) -> Any:
        """
        Call the management API; an object that is already missing is not an error.
        """
        return await asyncio.to_thread(self.broker.api, method, path, body, ignore_missing=True)

    async def add_user(self, password: str = PASSWORD) -> None:
        """
        Create the user, or change its password.
        """
        await self.api("PUT", f"users/{self.user}", {"password": password, "tags": ""})

    async def delete_user(self) -> None:
        """
        Remove the user; its connections are closed.
        """
        await self.api("DELETE", f"users/{self.user}")

    async def permit(
        self, *, configure: str = EVERYTHING, write: str = EVERYTHING, read: str = EVERYTHING
    ) -> None:
        """
        Give the user these permissions and no others, from its next connection on.
        """
        rights = {"configure": configure, "write": write, "read": read}
        await self.api("PUT", f"permissions/{self.vhost}/{self.user}", rights)
        await self.disconnect()

    async def forbid(self) -> None:
        """
        Revoke the user's access to the virtual host.
        """
        await self.api("DELETE", f"permissions/{self.vhost}/{self.user}")
        await self.disconnect()

    async def disconnect(self) -> None:
        """
        Close the user's connections, for which RabbitMQ caches permissions.
        """
        await self.api("DELETE", f"connections/username/{self.user}")

    async def make_vhost(self) -> None:
        """
        Create the virtual host again, with all permissions.
        """
        await self.api("PUT", f"vhosts/{self.vhost}", {})
        await self.permit()

    async def delete_vhost(self) -> None:
        """
        Remove the virtual host and everything in it.
        """
        await self.api("DELETE", f"vhosts/{self.vhost}")

    async def set_policy(self, **definition: Any) -> None:
        """
        Apply a policy to all task queues, as an operator unaware of them might.
        """
        body = {"pattern": ".*", "definition": definition, "apply-to": "queues"}
        await self.api("PUT", f"policies/{self.vhost}/limits", body)

    async def clear_policy(self) -> None:
        """
        Remove the policy.
        """
        await self.api("DELETE", f"policies/{self.vhost}/limits")


@asynccontextmanager
async def administered(broker: Broker, broker_url: str) -> AsyncIterator[Administrator]:
    """
    A user with all permissions, for one block.
    """
    administrator = Administrator(broker, broker_url)
    await administrator.add_user()
    await administrator.permit()
    try:
        yield administrator
    finally:
        await administrator.delete_user()


class System:
    """
    A relay, and a worker that completes every task it gets.

    Attributes:
        events: What relay and worker log.
    """

    def __init__(self, db: Database, relay: Relay, transport: RabbitTransport) -> None:
        self.db = db
        self.relay = relay
        self.transport = transport
        self.events: list[Any] = []

    async def until_told(self, event: str, *words: str) -> None:
        """
        Wait until relay or worker logs this event, with these words in it.
        """

        async def is_told() -> bool:
            return any(
                logged["event"] == event and all(word in str(logged) for word in words)
                for logged in self.events
            )

        try:
            await until(is_told)
        except TimeoutError:
            raise AssertionError(f"no {event} with {words} in {self.events[-20:]}") from None

    async def until_completed(self, task_ids: Sequence[Any]) -> None:
        """
        Wait until each of these tasks is completed.
        """

        async def are_completed() -> bool:
            done = await self.db.fetchval(
                "SELECT count(*) FROM asyncflow.tasks WHERE id = ANY ($1) AND state = 'completed'",
                task_ids,
            )
            return bool(done == len(task_ids))

        try:
            await until(are_completed)
        except TimeoutError:
            raise AssertionError(f"not all completed; {self.events[-20:]}") from None

    async def work(self, slots: int) -> None:
        """
        Complete claimed tasks until the transport is stopped.
        """
        while taken := await self.transport.take(slots, window=slots):
            await complete(self.db, taken)
            for claim in taken:
                self.transport.let_go(claim)


@asynccontextmanager
async def a_system(
    db: Database,
    url: str,
    *,
    prefix: str = PREFIX,
    slots: int = 4,
    works: bool = True,
    backoff: BackoffTimes | None = None,
    owned_seconds: float = OWNED_SECONDS,
) -> AsyncIterator[System]:
    """
    A relay and a worker for one block; neither may end before the block does.

    Args:
        works: Whether the worker takes tasks; otherwise it is only registered.
        backoff: Waits after failures; None for the default.
        owned_seconds: How long the names stay reserved for them afterwards.
    """
    backoff = backoff or BackoffTimes()
    worker = await a_worker(db, slots=slots)
    claimant = Claimant(worker.id, (QUEUE,), [Offer(NAME, 5, 900.0)])
    transport = RabbitTransport(
        db,
        claimant,
        broker_url=url,
        prefix=prefix,
        times=rabbitmq.Times(backoff=backoff, owned=owned_seconds),
    )
    times = relay_times.Times(backoff=backoff, owned=owned_seconds)
    system = System(db, Relay(db, url, prefix=prefix, times=times), transport)
    with capture_logs() as system.events:
        running = [asyncio.create_task(system.relay.run())]
        if works:
            await transport.open()
            running.append(asyncio.create_task(system.work(slots)))
        try:
            yield system
            assert not [task for task in running if task.done()]
        finally:
            await transport.stop()
            await transport.close()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
