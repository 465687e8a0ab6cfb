"""
How long the backoff is after a failure of RabbitMQ or one of its queues.
"""

from __future__ import annotations

from asyncflow.transport.rabbitmq.queue_backoff import (
    BackoffTimes,
    ConnectionBackoff,
    QueueBackoff,
)


def test_a_queue_is_skipped_for_longer_after_every_failure_up_to_fifteen_seconds() -> None:
    """
    A passing fault costs a second; a lasting one costs little, however long it lasts.
    """
    backoff = QueueBackoff()
    seconds = []
    for _ in range(9):
        backoff.failed("video", now=0.0)
        seconds.append(next(s for s in range(100) if not backoff.skips("video", now=float(s))))

    assert [1, 2, 4, 8, 15, 15, 15, 15, 15] == seconds
    assert BackoffTimes().seconds_max == seconds[-1]


def test_a_queue_that_works_again_starts_over() -> None:
    """
    The next failure of a queue that worked again costs a second, and other queues are never
    skipped.
    """
    backoff = QueueBackoff()
    backoff.failed("video", now=0.0)
    backoff.failed("video", now=0.0)
    assert not backoff.skips("mail", now=0.0)
    assert backoff.skips("video", now=1.0)

    backoff.worked("video")

    assert not backoff.skips("video", now=0.0)
    backoff.failed("video", now=5.0)
    assert not backoff.skips("video", now=6.0)


def waits(backoff: ConnectionBackoff, count: int, *, may_pass: bool) -> list[float]:
    """
    The waits after each of this many consecutive failures.
    """
    return [backoff.next(may_pass=may_pass) for _ in range(count)]


def test_what_only_a_person_can_change_is_tried_less_and_less_often() -> None:
    """
    A refused login is retried less and less often, since each one costs RabbitMQ work and a log
    line; an outage passes on its own.
    """
    backoff = ConnectionBackoff(BackoffTimes())

    refused = waits(backoff, 9, may_pass=False)
    [lost] = waits(backoff, 1, may_pass=True)
    backoff.reset()
    [refused_again] = waits(backoff, 1, may_pass=False)

    for seconds, longest in zip(refused, [1, 2, 4, 8, 15, 15, 15, 15, 15], strict=True):
        assert longest / 2 <= seconds <= longest
    shortest, longest_after_outage = BackoffTimes().reconnect_seconds
    assert shortest <= lost <= longest_after_outage
    assert refused_again <= 1
