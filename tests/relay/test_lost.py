"""
The maximum number of hints in the ready messages of a queue.
"""

from __future__ import annotations

from asyncflow.relay.lost import LargestPack
from asyncflow.transport.rabbitmq.message import PACK_MAX


def test_the_largest_pack_counts_until_it_is_forgotten() -> None:
    """
    The largest pack counts until it expires: a smaller one does not replace it, and one of the same
    size renews it.
    """
    pack = LargestPack(remembered_seconds=60, now=0)
    pack.forget()
    assert 1 == pack.hints(now=0)

    pack.sent(20, now=0)
    pack.sent(5, now=30)
    assert 20 == pack.hints(now=60)
    pack.sent(20, now=60)

    assert 20 == pack.hints(now=120)
    assert 1 == pack.hints(now=121)


def test_a_smaller_pack_counts_after_the_largest() -> None:
    """
    Once a large pack no longer counts, the next pack does, whatever its size.
    """
    pack = LargestPack(remembered_seconds=60, now=0)
    pack.sent(20, now=0)

    pack.sent(5, now=61)

    assert 5 == pack.hints(now=100)


def test_packs_of_a_former_leader_may_be_as_large_as_any() -> None:
    """
    A new leader assumes packs of any size, since it does not know what is in RabbitMQ.
    """
    pack = LargestPack(remembered_seconds=60, now=0)

    assert PACK_MAX == pack.hints(now=60)
    assert 1 == pack.hints(now=61)
