"""
Cyclic garbage is collected by the memory it holds, however few objects it consists of.
"""

from __future__ import annotations

import errno
import gc
import json
from collections.abc import Iterator

import pytest

from asyncflow.domain.outcome import Completed
from asyncflow.handlers import DEFAULT_REGISTRY
from asyncflow.worker.isolation.garbage import CHECK_SECONDS, COLLECT_SECONDS, GROWTH_BYTES, Garbage
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.isolation.nursery import Nursery
from tests.worker import odd_handlers
from tests.worker.test_isolation import ISOLATIONS, run

MIB = 1 << 20


class Process:
    """
    A process with a simulated memory and clock, whose collections free a planned amount.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.bytes_held = 400 * MIB
        self.gives_back: dict[int, int] = {}
        self.collected: list[int] = []
        self.garbage = Garbage(
            resident=lambda: self.bytes_held, collect=self.collect, clock=lambda: self.now
        )

    def collect(self, generation: int) -> None:
        """
        Record the collection.
        """
        self.collected.append(generation)
        self.bytes_held -= self.gives_back.get(generation, 0)

    def grows(self, size: int, *, seconds: float = 2 * CHECK_SECONDS) -> list[int]:
        """
        Grow by this much, after this long; return the generations that get collected.
        """
        self.collected.clear()
        self.now += seconds
        self.bytes_held += size
        self.garbage.check()
        return list(self.collected)


def test_growth_is_answered_by_a_collection_of_what_is_young() -> None:
    """
    Growth triggers a collection of the young generation once it is large enough, and again after as
    much more.
    """
    process = Process()
    process.gives_back = {1: GROWTH_BYTES}

    assert [] == process.grows(GROWTH_BYTES)
    assert [1] == process.grows(1)
    assert [] == process.grows(GROWTH_BYTES)
    assert [1] == process.grows(1)


def test_a_full_collection_follows_when_memory_has_grown_by_a_quarter() -> None:
    """
    A full collection waits for growth by a quarter: it takes longer the larger the program, and
    what a program keeps is not garbage.
    """
    process = Process()

    answers = [process.grows(GROWTH_BYTES + 1) for _ in range(8)]

    assert [[1], [1], [1], [1, 2], [1], [1], [1], [1]] == answers


def test_memory_that_was_given_back_is_not_room_for_garbage() -> None:
    """
    The next collection is due relative to the lowest point of memory, not the highest.
    """
    process = Process()
    process.grows(1_000 * MIB)
    process.grows(-1_100 * MIB)

    assert [1, 2] == process.grows(100 * MIB)


def test_garbage_does_not_stay_for_longer_than_a_minute() -> None:
    """
    Garbage is collected within a minute, since it may hold sockets, which do not show in memory.
    """
    process = Process()

    assert [] == process.grows(0, seconds=COLLECT_SECONDS - 1)
    assert [1] == process.grows(0, seconds=2)


def test_checking_again_immediately_costs_nothing() -> None:
    """
    Repeated checks are cheap, since thousands of attempts may end in a second.
    """
    process = Process()
    process.grows(0)

    assert [] == process.grows(GROWTH_BYTES + 1, seconds=CHECK_SECONDS / 2)


def test_a_process_without_file_descriptors_skips_a_check() -> None:
    """
    It cannot ask for its memory then, and no attempt may fail for that.
    """
    process = Process()

    def has_none() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    resident, process.garbage._resident = process.garbage._resident, has_none
    assert [] == process.grows(GROWTH_BYTES + 1)

    process.garbage._resident = resident
    assert [1] == process.grows(0)


@pytest.fixture
def own_thresholds() -> Iterator[None]:
    """
    Restore the thresholds of Python's collector, which the handler raises.
    """
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("where", ISOLATIONS)
async def test_exceptions_that_handlers_keep_do_not_pile_up(
    where: str, own_thresholds: None
) -> None:
    """
    Exceptions that hold their handler's local variables are collected; two hundred attempts would
    otherwise hold 800 MiB.
    """
    found = DEFAULT_REGISTRY.get(f"keep-its-error.{where}")
    assert found is not None
    kept = []
    async with Nursery(["tests.worker.odd_handlers"]) as nursery:
        isolation = Isolation(slots=1, nursery=nursery)
        for _ in range(200):
            outcome = await run(isolation, found)
            assert isinstance(outcome, Completed)
            kept.append(json.loads(outcome.result))
        await isolation.close()

    assert odd_handlers.BALLAST_BYTES * max(kept) < 400 * MIB
