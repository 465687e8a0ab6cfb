"""
The settler on the real store: it reports correctly what became of a settlement, even if an answer
was lost.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from asyncflow.domain.outcome import Failure, Settlement
from asyncflow.domain.states import Event
from asyncflow.domain.task import Claim
from asyncflow.errors import StatementRefused, StoreUnavailable
from asyncflow.maintenance.reaper import Reaper
from asyncflow.store import steer
from asyncflow.store.database import Database
from asyncflow.store.settle import Settling
from asyncflow.worker.settler import make_settler
from tests.support.builders import SETTLEMENTS
from tests.support.tasks import a_worker, claim, submit
from tests.support.wire import Wire, laid


@pytest.fixture
async def wire(database_url: str) -> AsyncIterator[Wire]:
    """
    The worker's connection to PostgreSQL.
    """
    async with laid({"postgres": database_url}) as wires:
        yield wires["postgres"]


async def a_claim(db: Database, *, max_attempts: int = 5) -> Claim:
    """
    The claim of a task on a live worker.
    """
    worker = await a_worker(db)
    await submit(db, max_attempts=max_attempts)
    [taken] = await claim(db, worker.id)
    return taken


def settling(taken: Claim, settlement: Settlement) -> Settling:
    """
    The settling of the attempt of `taken`.
    """
    return Settling(taken.task_id, taken.lease_id, settlement)


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize("event", SETTLEMENTS)
async def test_a_settlement_whose_answer_was_lost_counts_as_written(
    db: Database, wire: Wire, event: Event, is_cancelled: bool
) -> None:
    """
    A repeated settlement, whose first answer was lost, has nothing left to write and counts as
    written.
    """
    taken = await a_claim(db)
    if is_cancelled:
        await steer.cancel(db, 1, taken.task_id)
    async with Database(wire.url) as far:
        settler = make_settler(far)
        ended = settling(taken, SETTLEMENTS[event])
        becomes_cancelled = is_cancelled and event in (Event.RETRY, Event.RELEASE)
        wire.hold_answers("SET state = 'cancelled'" if becomes_cancelled else "SET state = ")
        first = settler.submit(ended)
        await wire.has_answered()
        wire.reset()
        with pytest.raises(StoreUnavailable):
            await first

        assert await settler.submit(ended)


@pytest.mark.parametrize(
    ("event", "max_attempts", "is_cancelled"),
    [
        *[(event, 5, False) for event in SETTLEMENTS],
        (Event.FAIL, 1, False),
        (Event.CANCEL, 5, True),
        (Event.RELEASE, 5, True),
    ],
)
async def test_what_the_reaper_wrote_under_a_lease_is_not_taken_for_its_settlement(
    db: Database, event: Event, max_attempts: int, is_cancelled: bool
) -> None:
    """
    A settlement of the reaper is not mistaken for the worker's, although the task ended in the same
    state.
    """
    taken = await a_claim(db, max_attempts=max_attempts)
    if is_cancelled:
        await steer.cancel(db, 1, taken.task_id)
    await db.execute("UPDATE asyncflow.workers SET stopped_at = now()")
    assert 1 == await Reaper(grace_seconds=0).reap(db)

    assert not await make_settler(db).submit(settling(taken, SETTLEMENTS[event]))


async def test_a_settlement_counts_as_written_although_another_of_its_batch_was_refused(
    db: Database,
) -> None:
    """
    A batch that is repeated one by one reports settlements written in the first try as written.
    """
    await db.execute(
        "ALTER TABLE asyncflow.tasks_finished ADD CHECK (failure->>'kind' <> 'Cursed')"
    )
    good, bad = await a_claim(db), await a_claim(db)
    settler = make_settler(db)
    completed = settler.submit(settling(good, SETTLEMENTS[Event.COMPLETE]))
    cursed = Settlement(Event.FAIL, failure=Failure("Cursed", ""))
    refused = settler.submit(settling(bad, cursed))

    assert await completed
    with pytest.raises(StatementRefused):
        await refused
