"""
Every odd thing that handlers return and raise, as tasks of one worker: each ends as a dead letter
that says why, nothing is stuck, and the worker continues.

`test_isolation` checks each outcome in detail; here the outcomes have to reach PostgreSQL.
"""

from __future__ import annotations

from typing import Any

import pytest

from asyncflow.handlers import DEFAULT_REGISTRY, Registry
from asyncflow.store.database import Database
from tests.support.running import a_running_worker
from tests.support.tasks import submit, until, until_states
from tests.worker import odd_handlers

ISOLATIONS = ["loop", "thread", "process"]
ENDINGS: dict[str, tuple[Any, ...]] = {**odd_handlers.RAISES, **odd_handlers.UNSTORABLE}


@pytest.mark.parametrize("where", ISOLATIONS)
async def test_every_odd_ending_is_recorded_and_the_worker_goes_on(
    db: Database, where: str
) -> None:
    """
    Of all odd tasks, submitted together and run four at a time, each is recorded, and a good task
    then completes.
    """
    registry = Registry()
    names = [f"{what.replace(' ', '-')}.{where}" for what in (*ENDINGS, "number")]
    for name in names:
        handler = DEFAULT_REGISTRY.get(name)
        assert handler is not None
        registry.add(handler)

    async with a_running_worker(db, registry=registry) as running:

        async def is_idle() -> bool:
            return running.worker.running == 0

        for name in names:
            await submit(db, name=name, max_attempts=1)
        await until_states(db, failed=len(ENDINGS), completed=1)

        await until(is_idle)
        assert not running.ended.done()

    rows = await db.fetch("SELECT name, attempt, failure->>'kind' AS kind FROM asyncflow.tasks")
    expected = {name: _kind(what) for what, name in zip(ENDINGS, names, strict=False)}
    assert expected == {row["name"]: row["kind"] for row in rows if row["kind"] is not None}
    assert {1} == {row["attempt"] for row in rows}


def _kind(what: str) -> str:
    """
    The kind under which the ending `what` must be recorded.
    """
    kind: str = ENDINGS[what][1]
    return kind
