"""
What follows an attempt, case by case: settled, retried, failed or cancelled.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.domain.outcome import (
    OUTCOMES,
    Cancelled,
    Completed,
    Crashed,
    Failed,
    Failure,
    Outcome,
    Released,
    Settlement,
    decide,
)
from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import TERMINAL, TRANSITIONS, Event, State
from asyncflow.verify.checker import SETTLED_AS
from asyncflow.wire.tasks import AttemptView

FAILURE = Failure("ValueError", "It did not work.")
BACKOFF = Backoff(base_seconds=2.0, factor=2.0, cap_seconds=60.0, jitter=False)

COMPLETE = Settlement(Event.COMPLETE, result="1")
FAIL = Settlement(Event.FAIL, failure=FAILURE)
CANCEL = Settlement(Event.CANCEL, failure=FAILURE)
RELEASE = Settlement(Event.RELEASE)


def retry(seconds: float) -> Settlement:
    """
    A retry that is due after this many seconds.
    """
    return Settlement(Event.RETRY, delay_seconds=seconds, failure=FAILURE)


@pytest.mark.parametrize(
    ("outcome", "failures", "max_attempts", "expected"),
    [
        # What the handler completed stays completed, whatever happened before.
        (Completed("1"), 0, 1, COMPLETE),
        (Completed("1"), 99, 1, COMPLETE),
        (Cancelled(FAILURE), 0, 5, CANCEL),
        (Cancelled(FAILURE), 4, 5, CANCEL),
        (Released(), 0, 1, RELEASE),
        (Released(), 99, 1, RELEASE),
        # A failure is retried after a growing wait until the attempts are used up.
        (Failed(FAILURE), 0, 3, retry(2)),
        (Failed(FAILURE), 1, 3, retry(4)),
        (Failed(FAILURE), 2, 3, FAIL),
        (Failed(FAILURE), 3, 3, FAIL),
        (Failed(FAILURE), 0, 1, FAIL),
        (Failed(FAILURE), 900, 1_000, retry(60)),
        # A failure that no retry can fix ends the task immediately.
        (Failed(FAILURE, retryable=False), 0, 5, FAIL),
        (Failed(FAILURE, retryable=False, after_seconds=1), 0, 5, FAIL),
        # The handler's own delay wins over the backoff, but not over the last attempt.
        (Failed(FAILURE, after_seconds=0), 0, 5, retry(0)),
        (Failed(FAILURE, after_seconds=7), 3, 5, retry(7)),
        (Failed(FAILURE, after_seconds=7), 4, 5, FAIL),
        # The first crash is retried immediately; a task that keeps crashing is poison.
        (Crashed(FAILURE), 0, 3, retry(0)),
        (Crashed(FAILURE), 1, 3, retry(2)),
        (Crashed(FAILURE), 2, 3, FAIL),
        (Crashed(FAILURE), 0, 1, FAIL),
    ],
)
def test_an_outcome_leads_to_one_settlement(
    outcome: Outcome, failures: int, max_attempts: int, expected: Settlement
) -> None:
    """
    Every case of the table leads to the settlement that it lists.
    """
    found = decide(outcome, failures=failures, max_attempts=max_attempts, backoff=BACKOFF, random=0)

    assert expected == found


@given(
    outcome=st.sampled_from(
        [Completed("1"), Failed(FAILURE), Crashed(FAILURE), Cancelled(FAILURE), Released()]
    ),
    failures=st.integers(0, 10**6),
    max_attempts=st.integers(1, 1_000),
    random=st.floats(0, 1, exclude_max=True),
)
def test_every_decision_is_a_legal_way_out_of_running(
    outcome: Outcome, failures: int, max_attempts: int, random: float
) -> None:
    """
    No combination of numbers leads to an illegal transition or a negative wait.
    """
    settlement = decide(
        outcome, failures=failures, max_attempts=max_attempts, backoff=Backoff(), random=random
    )

    assert settlement.event in TRANSITIONS[State.RUNNING]
    assert settlement.delay_seconds >= 0


@given(max_attempts=st.integers(1, 50), crashes=st.booleans())
def test_a_task_that_always_fails_ends_after_max_attempts(max_attempts: int, crashes: bool) -> None:
    """
    Neither failures nor crashes can keep a poison task alive.
    """
    outcome = Crashed(FAILURE) if crashes else Failed(FAILURE)
    attempts = 1
    while (
        decide(
            outcome, failures=attempts - 1, max_attempts=max_attempts, backoff=BACKOFF, random=0
        ).event
        is Event.RETRY
    ):
        attempts += 1

    assert max_attempts == attempts


def test_an_outcome_is_called_the_same_everywhere() -> None:
    """
    Rows, logs and the checker's history use one set of words; HTTP shows them in capitals.
    """
    words = set(OUTCOMES.values())
    shown = AttemptView.model_json_schema()["properties"]["outcome"]["enum"]

    assert {event for event in Event if event in TRANSITIONS[State.RUNNING]} == set(OUTCOMES)
    assert {word for word in words if word in TERMINAL} == {*TERMINAL}
    assert words == set(SETTLED_AS)
    assert {"RUNNING", *map(str.upper, words)} == set(shown)
