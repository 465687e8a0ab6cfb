"""
How long a queue that cannot be used is left alone.
"""

from __future__ import annotations

from asyncflow.transport.rabbitmq.queue_backoff import (
    RECONNECT_SECONDS,
    REST_SECONDS_MAX,
    Reconnecting,
    RestingQueues,
)


def test_a_queue_rests_longer_after_every_failure_up_to_fifteen_seconds() -> None:
    """
    A passing fault costs a second; a lasting one costs little for ever.
    """
    resting = RestingQueues()
    rests = []
    for _ in range(9):
        resting.failed("video", now=0.0)
        rests.append(next(s for s in range(100) if not resting.rests("video", now=float(s))))

    assert [1, 2, 4, 8, 15, 15, 15, 15, 15] == rests
    assert REST_SECONDS_MAX == rests[-1]


def test_a_queue_that_works_again_begins_anew() -> None:
    """
    And the queues beside it never rested.
    """
    resting = RestingQueues()
    resting.failed("video", now=0.0)
    resting.failed("video", now=0.0)
    assert not resting.rests("mail", now=0.0)
    assert resting.rests("video", now=1.0)

    resting.worked("video")

    assert not resting.rests("video", now=0.0)
    resting.failed("video", now=5.0)
    assert not resting.rests("video", now=6.0)


def test_what_only_a_person_can_change_is_tried_ever_less_often() -> None:
    """
    A refused login costs RabbitMQ something, and its log a line; an outage passes by itself.
    """
    reconnecting = Reconnecting()

    refused = [reconnecting.wait_seconds(may_pass=False) for _ in range(9)]
    lost = reconnecting.wait_seconds(may_pass=True)
    reconnecting.worked()
    refused_again = reconnecting.wait_seconds(may_pass=False)

    for seconds, longest in zip(refused, [1, 2, 4, 8, 15, 15, 15, 15, 15], strict=True):
        assert longest / 2 <= seconds <= longest
    assert RECONNECT_SECONDS[0] <= lost <= RECONNECT_SECONDS[1]
    assert refused_again <= 1
