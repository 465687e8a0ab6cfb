"""
Task ids are UUIDv7s that sort by submission.
"""

from __future__ import annotations

from itertools import count
from uuid import RFC_4122, UUID

from hypothesis import given
from hypothesis import strategies as st

from asyncflow.domain.task import TaskIds

MILLISECOND = 1_000_000


def test_ids_grow_within_one_process() -> None:
    """
    Ids of one process grow, even with thousands in one millisecond.
    """
    ids = TaskIds()

    made = [ids.next() for _ in range(20_000)]

    assert sorted(set(made)) == made


@given(st.lists(st.integers(0, 2**47), min_size=2, max_size=50))
def test_ids_grow_when_the_clock_steps_back(times_ms: list[int]) -> None:
    """
    Ids grow however the clock jumps.
    """
    times = iter([ms * MILLISECOND for ms in times_ms])
    ids = TaskIds(clock_ns=lambda: next(times))

    made = [ids.next() for _ in times_ms]

    assert sorted(set(made)) == made


def test_more_ids_than_the_counter_holds_borrow_the_next_millisecond() -> None:
    """
    4,096 ids fit into one millisecond; the next one borrows from the following and still sorts
    after them.
    """
    ids = TaskIds(clock_ns=lambda: 5 * MILLISECOND, random_bytes=lambda _: b"\xff" * 8)

    made = [ids.next() for _ in range(4_097)]

    assert sorted(set(made)) == made
    assert [5, 5, 6] == [_millisecond(id) for id in (made[0], made[4_095], made[4_096])]


@given(st.integers(0, 2**48 - 1), st.binary(min_size=8, max_size=8))
def test_an_id_has_the_bits_of_rfc_9562(time_ms: int, random: bytes) -> None:
    """
    For any time and randomness, an id has version 7, its variant, and the millisecond first.
    """
    id = TaskIds(clock_ns=lambda: time_ms * MILLISECOND, random_bytes=lambda _: random).next()

    assert (RFC_4122, 7) == (id.variant, id.version)
    assert time_ms == _millisecond(id)
    assert int.from_bytes(random, "big") >> 2 == id.int & (2**62 - 1)


def test_two_processes_do_not_make_the_same_id() -> None:
    """
    62 random bits distinguish the ids of two processes within one millisecond.
    """
    clock = count(MILLISECOND).__next__
    ours, theirs = TaskIds(clock_ns=clock), TaskIds(clock_ns=clock)

    made = [ids.next() for _ in range(1_000) for ids in (ours, theirs)]

    assert len(made) == len(set(made))


def _millisecond(id: UUID) -> int:
    return id.int >> 80
