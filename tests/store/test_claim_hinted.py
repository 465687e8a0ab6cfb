"""
Claiming by hints from a broker: any id at any time, and only one caller wins.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from uuid import UUID, uuid4

import pytest

from asyncflow.domain.states import State
from asyncflow.store import hints, queues
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from tests.support.builders import OFFERS, a_task, as_sent, backdate, claimed, state_of, submitted
from tests.support.waiting import until_someone_waits_for_a_lock


async def test_hints_that_cannot_be_followed_are_left_alone(db: Database) -> None:
    """
    Hints are ignored if they are duplicates, unknown ids, or name tasks that are finished, running,
    expired, foreign or not due.
    """
    good = await a_task(db, state=State.QUEUED)
    others = [
        await a_task(db, state=State.RUNNING),
        await a_task(db, state=State.COMPLETED),
        await a_task(db, state=State.FAILED),
        await a_task(db, state=State.CANCELLED),
        await a_task(db, due_in_seconds=60),
        await a_task(db, state=State.QUEUED, name="other"),
        expired := await a_task(db, state=State.QUEUED),
        paused := await a_task(db, state=State.QUEUED, queue="paused"),
    ]
    await backdate(db, "tasks", expired.id, expires_at=0)
    await queues.pause(db, "paused")
    hints = [good.id, *(task.id for task in others), good.id, uuid4(), uuid4()]

    found = await claimed(db, *hints)

    assert [good.id] == [claim.task_id for claim in found]
    assert State.QUEUED == await state_of(db, paused.id)


async def test_a_hint_may_overtake_the_relays_note(db: Database) -> None:
    """
    A hint claims a pending task, and the mark that comes later changes nothing.
    """
    task = await a_task(db)

    sent = await as_sent(db, [task.id])
    found = await claimed(db, task.id)
    await hints.mark_queued(db, sent)

    assert [task.id] == [claim.task_id for claim in found]
    assert State.RUNNING == await state_of(db, task.id)


async def test_a_hint_waits_for_a_note_that_is_being_committed(db: Database) -> None:
    """
    A claim waits for the row's lock; skipping the row would lose the hint and delay the task by
    half a minute.
    """
    task = await a_task(db)

    async with db.transaction() as relay:
        await hints.mark_queued(relay, await as_sent(db, [task.id]))
        claiming = asyncio.create_task(claimed(db, task.id))
        await until_someone_waits_for_a_lock(db)

    assert [task.id] == [claim.task_id for claim in await claiming]


async def test_concurrent_claimers_of_the_same_hints_never_take_a_task_twice(
    db: Database,
) -> None:
    """
    Of four workers that get every hint, in different orders and batches, one claims the task.
    """
    ids = await submitted(db, 1_500, name="a") + await submitted(db, 1_500, name="b")
    offers = [Offer("a", 5, 900.0), Offer("b", 5, 900.0)]

    async def claimer(number: int) -> list[UUID]:
        mine: list[UUID] = []
        hints = ids[::-1] if number % 2 else ids
        for start in range(0, len(hints), 50 + number):
            batch = hints[start : start + 50 + number]
            ours = offers[:: (-1) ** number]
            mine += [c.task_id for c in await claimed(db, *batch, offers=ours)]
        return mine

    taken = await asyncio.gather(*(claimer(number) for number in range(4)))

    assert dict.fromkeys(ids, 1) == Counter(id for mine in taken for id in mine)


@pytest.mark.parametrize("offers", [OFFERS, OFFERS * 3])
async def test_each_claim_call_has_one_lease_for_all_its_tasks(
    db: Database, offers: tuple[Offer, ...]
) -> None:
    """
    The caller chooses the lease, so it can recognise claims whose answer it never received.
    """
    lease_id = uuid4()
    ids = await submitted(db, 5)

    found = await claimed(db, *ids, lease_id=lease_id, offers=offers)

    assert sorted(ids) == sorted(claim.task_id for claim in found)
    assert {lease_id} == {claim.lease_id for claim in found}


async def test_no_hints_claim_nothing(db: Database) -> None:
    """
    An empty batch claims nothing and raises nothing.
    """
    assert [] == await claimed(db)
