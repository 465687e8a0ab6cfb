"""
The settings that a handler may choose for its tasks, and their bounds.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from asyncflow.domain.policy import Policy


@pytest.mark.parametrize(
    "values",
    [
        {"queue": "a"},
        {"queue": "A-z_0.9" * 18},
        {"max_attempts": 1},
        {"max_attempts": 1_000},
        {"timeout_seconds": 0.001},
        {"timeout_seconds": 604_800.0},
    ],
)
def test_a_policy_within_the_bounds_is_taken(values: dict[str, Any]) -> None:
    """
    A policy within its bounds is accepted, and the bounds themselves are allowed.
    """
    policy = Policy(**values)

    assert values == {name: getattr(policy, name) for name in values}


@pytest.mark.parametrize(
    "values",
    [
        {"queue": ""},
        {"queue": "a" * 129},
        {"queue": "a b"},
        {"queue": "a\n"},
        {"queue": "ä"},
        {"max_attempts": 0},
        {"max_attempts": 1_001},
        {"timeout_seconds": 0.0},
        {"timeout_seconds": 604_801.0},
        {"timeout_seconds": math.nan},
        {"timeout_seconds": math.inf},
    ],
)
def test_a_policy_out_of_bounds_is_refused_with_the_value(values: dict[str, Any]) -> None:
    """
    The error names the field and the value, so that the handler's author can find it.
    """
    (field,) = values

    with pytest.raises(ValueError, match=field):
        Policy(**values)
