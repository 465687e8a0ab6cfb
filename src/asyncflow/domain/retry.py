"""
The delay between a failed attempt and the next one.

Exponential backoff with full jitter: ``uniform(0, min(cap, base · factor ** (failures - 1)))``
(AWS Architecture Blog, "Exponential Backoff and Jitter", 2015). Pure: the random number is
an argument.
"""

from __future__ import annotations

from dataclasses import dataclass

EXPONENT_MAX = 64
"""Clamped before multiplying, so that no number of failures overflows."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """
    The shape of the delays between attempts.

    A subclass may compute its delays by code of its own. Workers follow it; the reaper, which
    settles the attempts of dead workers without their code, follows the default instead.

    Attributes:
        base_seconds: Upper bound of the first delay, 0 or more. 0 retries immediately.
        factor: Growth of the bound per failure, 1 to 100. 1 keeps it constant.
        cap_seconds: The bound never exceeds this; at least `base_seconds`, at most 30 days.
        jitter: Whether to draw uniformly below the bound, to spread a herd; False waits the bound.
    """

    base_seconds: float = 2.0
    factor: float = 2.0
    cap_seconds: float = 3_600.0
    jitter: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.base_seconds <= self.cap_seconds <= 30 * 86_400:
            raise ValueError(
                f"base_seconds={self.base_seconds}, cap_seconds={self.cap_seconds} "
                "must satisfy 0 ≤ base_seconds ≤ cap_seconds ≤ 2,592,000 (30 days)"
            )
        if not 1 <= self.factor <= 100:
            raise ValueError(f"factor={self.factor} must be between 1 and 100")

    @property
    def is_data(self) -> bool:
        """
        Whether its fields define it completely, so that it can be stored.
        """
        return type(self) is Backoff

    def delay_seconds(self, failures: int, *, random: float) -> float:
        """
        The delay after the `failures`-th failure.

        Args:
            failures: Failures so far, including this one; 0 means no delay.
            random: A number in [0, 1).
        """
        if failures <= 0:
            return 0.0
        exponent = min(failures - 1, EXPONENT_MAX)
        bound = min(self.cap_seconds, self.base_seconds * self.factor**exponent)
        return bound * random if self.jitter else bound
