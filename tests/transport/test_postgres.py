"""
What is specific to the transport without a broker.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from asyncflow.domain.task import Claim
from asyncflow.store import claims, due
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.due import LowWaterMark
from asyncflow.transport import Claimant
from asyncflow.transport.postgres import PostgresTransport
from tests.support.tasks import NAME, QUEUE, a_worker, submit, until

NEVER = {QUEUE: [datetime.max.replace(tzinfo=UTC)] * 10}


@pytest.fixture
async def transport(db: Database) -> PostgresTransport:
    """
    A transport with a worker's names and queues, for single claims.
    """
    worker = await a_worker(db)
    return PostgresTransport(db, Claimant(worker.id, (QUEUE,), (Offer(NAME, 5, 900.0),)))


async def test_a_claim_begins_where_the_low_water_mark_says(
    db: Database, transport: PostgresTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A claim starts at the low-water mark of its own queues and names.
    """
    asked: list[dict[str, Any]] = []

    def never(self: LowWaterMark, **what: Any) -> Any:
        asked.append(what)
        return NEVER

    [task_id] = await submit(db)
    with monkeypatch.context() as patched:
        patched.setattr(LowWaterMark, "since", never)
        assert [] == await transport._claim(1)

    assert [{"queues": [QUEUE], "names": [NAME]}] == asked
    assert [task_id] == [claim.task_id for claim in await transport._claim(1)]


@pytest.mark.parametrize("fails", [False, True])
async def test_after_a_slow_claim_the_next_ones_begin_late(
    db: Database, transport: PostgresTransport, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """
    After a slow claim, even one that timed out, the next ones start at the low-water mark.
    """
    transport._due._mark = LowWaterMark(db, worth_seconds=0.0)
    since: list[Any] = []
    original = claims.claim_due

    async def claim_due(db: Database, **more: Any) -> list[Claim]:
        since.append(more["since"])
        if len(since) == 1:
            await asyncio.sleep(2 * due.SLOW_SECONDS)
            if fails:
                raise TimeoutError
        return await original(db, **more)

    monkeypatch.setattr(claims, "claim_due", claim_due)
    if fails:
        with pytest.raises(TimeoutError):
            await transport._claim(1)

    async def begins_late() -> bool:
        await transport._claim(1)
        return bool(since[-1])

    await until(begins_late)
    assert [{}, {}] == since[:2]
    await transport.close()
