"""
Delays between attempts stay within their bounds, for any number of failures.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.domain.retry import Backoff

DAYS_30 = 30 * 86_400.0

backoffs = st.builds(
    lambda base, more, factor, jitter: Backoff(
        base_seconds=base,
        factor=factor,
        cap_seconds=min(DAYS_30, base + more),
        jitter=jitter,
    ),
    base=st.floats(0, DAYS_30),
    more=st.floats(0, DAYS_30),
    factor=st.floats(1, 100),
    jitter=st.booleans(),
)
failures = st.integers(0, 10**6)
randoms = st.floats(0, 1, exclude_max=True)


@given(backoffs, failures, randoms)
def test_a_wait_is_never_negative_and_never_above_the_cap(
    backoff: Backoff, failures: int, random: float
) -> None:
    """
    Every wait is between zero and the cap, and a million failures do not overflow.
    """
    delay = backoff.delay_seconds(failures, random=random)

    assert math.isfinite(delay)
    assert 0 <= delay <= backoff.cap_seconds


@given(backoffs, failures, randoms)
def test_jitter_only_shortens_a_wait(backoff: Backoff, failures: int, random: float) -> None:
    """
    The delay without jitter is the upper bound of the delay with it.
    """
    steady = Backoff(backoff.base_seconds, backoff.factor, backoff.cap_seconds, jitter=False)
    jittery = Backoff(backoff.base_seconds, backoff.factor, backoff.cap_seconds, jitter=True)

    bound = steady.delay_seconds(failures, random=random)

    assert jittery.delay_seconds(failures, random=random) == bound * random


@given(backoffs, failures)
def test_the_bound_never_shrinks_with_more_failures(backoff: Backoff, failures: int) -> None:
    """
    A task that keeps failing is never retried more often.
    """
    steady = Backoff(backoff.base_seconds, backoff.factor, backoff.cap_seconds, jitter=False)

    now = steady.delay_seconds(failures, random=0)

    assert now <= steady.delay_seconds(failures + 1, random=0)


def test_the_default_waits_double_from_two_seconds_to_an_hour() -> None:
    """
    The default waits double from two seconds to an hour, as documented.
    """
    backoff = Backoff(jitter=False)

    waits = [backoff.delay_seconds(n, random=0) for n in range(14)]

    assert [0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3600, 3600] == waits


@pytest.mark.parametrize(
    "values",
    [
        {"base_seconds": -1},
        {"base_seconds": 10, "cap_seconds": 9},
        {"cap_seconds": DAYS_30 + 1},
        {"factor": 0.99},
        {"factor": 101},
        {"factor": math.nan},
        {"base_seconds": math.nan},
        {"cap_seconds": math.inf},
    ],
)
def test_a_shape_out_of_bounds_is_refused(values: dict[str, float]) -> None:
    """
    A backoff out of bounds is refused when it is declared, not at the first failure.
    """
    with pytest.raises(ValueError, match="must"):
        Backoff(**values)  # type: ignore[arg-type]
