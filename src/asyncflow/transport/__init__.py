"""
How a worker gets tasks: the one seam between PostgreSQL alone and RabbitMQ.

A `Transport` turns "something may be due" into claims. Whatever carries the hint, a claim is
one guarded statement in `store.claims`, so a hint that is lost, late, doubled or forged can
neither lose a task nor run it twice. Everything after `take` is the same code.

    postgres   no broker: a claim finds due tasks itself, woken by NOTIFY
    rabbitmq   hints arrive as messages; the relay (`relay.relay`) sends them

The life of a hint:

    take      the worker has free slots: wait for hints, claim, return the claims
    let_go    the attempt is settled and committed: the hint may go (an ack)
    stop      take no more; hints without a claim go back for other workers

A hint is acknowledged after its settle is committed. That keeps redeliveries rare; safety does not
depend on it, because a redelivered hint meets a row that has moved on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from asyncflow.domain.task import Claim
from asyncflow.store.claims import Offer


@dataclass(frozen=True, slots=True)
class Claimant:
    """
    The worker that a transport claims for.

    Attributes:
        queues: The queues to take from.
        offers: The handler names it can run, with what each asks for.
    """

    worker_id: UUID
    queues: Sequence[str]
    offers: Sequence[Offer]


class Transport(Protocol):
    """
    A worker's source of tasks. See the package's docstring for the life of a hint.
    """

    async def take(self, slots: int, *, window: int) -> list[Claim]:
        """
        Wait until at least one task is claimed for this worker; claim at most `slots`.

        Outages of PostgreSQL or RabbitMQ are waited out inside. After `stop` it returns an empty
        list, also to a caller that is already waiting.

        Args:
            window: The most unfinished claims that the worker wants in total.
        """
        ...

    def let_go(self, claim: Claim) -> None:
        """
        Let go of the claim's hint: its attempt is settled, or its lease is lost.
        """
        ...

    async def stop(self) -> None:
        """
        Take no more, and hand back hints that were not claimed.
        """
        ...

    async def close(self) -> None:
        """
        Close every connection; hints of unfinished claims go back.
        """
        ...
