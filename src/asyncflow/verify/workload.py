"""
The workload: more than a dozen kinds of tasks, drawn by seed, submitted singly and in batches.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, field, replace
from typing import Any

BATCH_SHARE = 0.25
BATCH_SIZE_LEAST = 5
CALLS_PER_SECOND = 150
"""Requests per second. A higher rate of tasks leads to larger batches, not to more requests."""

READ_SHARE = 0.1
REDRIVEN = frozenset({"doom", "exit"})


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """
    One task to submit, and what its client does afterwards.

    Attributes:
        number: Part of the payload, so that every row can be traced to its submission.
        recipe: The kind of task, for the checker.
        body: The body of `POST /tasks`.
        digest: The digest of the payload's text that the result must contain.
        expires_after: Seconds from submission to `expires_at`; None for no expiry.
        cancel_after: Seconds from the 202 to a cancellation; None for none.
        redrive_after: Seconds from the 202 to a redrive; None for none.
        reads: How often its client reads it.
    """

    number: int
    recipe: str
    body: dict[str, Any]
    digest: str
    expires_after: float | None = None
    cancel_after: float | None = None
    redrive_after: float | None = None
    reads: int = 0


@dataclass(frozen=True, slots=True)
class Recipe:
    """
    A kind of task and how often it occurs.

    Attributes:
        weight: Its weight among tasks submitted singly.
        weight_in_batches: Its weight in batches. Expensive kinds, which need a process or further
            requests, are left out, so that they do not grow with the rate.
        ranges: Random numbers in the payload, with their bounds.
    """

    weight: float
    handler: str
    weight_in_batches: float = 0.0
    payload: dict[str, Any] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    delay: tuple[float, float] | None = None
    expiry: tuple[float, float] | None = None
    cancellation: tuple[float, float] | None = None


RECIPES = {
    "noop": Recipe(49, "verify.sleep", 80),
    "sleep": Recipe(15, "verify.sleep", 8, ranges={"seconds": (0.005, 0.2)}),
    "long": Recipe(4, "verify.sleep", ranges={"seconds": (2, 6)}),
    "fail": Recipe(7, "verify.fail", 4, payload={"times": 1}),
    "fail-often": Recipe(2, "verify.fail", 1, payload={"times": 3}),
    "doom": Recipe(2, "verify.doom"),
    "crunch": Recipe(1, "verify.crunch", ranges={"seconds": (0.05, 0.2)}),
    "exit": Recipe(0.7, "verify.exit"),
    "stubborn": Recipe(0.3, "verify.stubborn"),
    "fork": Recipe(0.5, "verify.fork", ranges={"seconds": (1, 20)}),
    "big": Recipe(1, "verify.big"),
    "delayed": Recipe(6, "verify.sleep", 6, delay=(0.5, 5)),
    "expiring": Recipe(2, "verify.sleep", delay=(0, 1), expiry=(1.1, 3)),
    "cancel": Recipe(4, "verify.sleep", ranges={"seconds": (0, 2)}, cancellation=(0, 2)),
    "cancel-failing": Recipe(
        3, "verify.fail", payload={"times": 3}, ranges={"seconds": (0.1, 0.6)}, cancellation=(0, 2)
    ),
    "cancel-delayed": Recipe(2, "verify.sleep", delay=(2, 2), cancellation=(0, 2)),
}


class Workload:
    """
    An endless supply of tasks. The same seed and rate yield the same tasks in the same order.

    Args:
        rate: Tasks submitted per second.
    """

    def __init__(self, seed: int, *, rate: float) -> None:
        self._random = random.Random(f"workload {seed}")
        self._numbers = itertools.count(1)
        per_call = rate / CALLS_PER_SECOND
        mean = max(BATCH_SIZE_LEAST, (per_call - 1 + BATCH_SHARE) / BATCH_SHARE)
        self._batch_size_max = int(2 * mean)

    def next_call(self) -> list[PlannedTask]:
        """
        The tasks of the next request: one, or a batch.
        """
        if self._random.random() >= BATCH_SHARE:
            return [self._next(in_batch=False)]
        size = self._random.randint(2, self._batch_size_max)
        return [self._next(in_batch=True) for _ in range(size)]

    def again(self, call: list[PlannedTask]) -> list[PlannedTask]:
        """
        The same tasks under new numbers, to repeat a submission of unknown outcome.

        The numbers are new because both submissions may be stored, each of them only once.
        """
        return [self._renumbered(planned) for planned in call]

    def _renumbered(self, planned: PlannedTask) -> PlannedTask:
        number = next(self._numbers)
        payload = {**planned.body["payload"], "submission": number}
        return replace(planned, number=number, body={**planned.body, "payload": payload})

    def _next(self, *, in_batch: bool) -> PlannedTask:
        chance = self._random
        weights = IN_BATCHES if in_batch else ONE_BY_ONE
        [recipe] = chance.choices([*weights], [*weights.values()])
        chosen = RECIPES[recipe]
        number = next(self._numbers)
        pad = chance.randbytes(chance.randint(0, 200)).hex()
        drawn = {name: chance.uniform(*bounds) for name, bounds in chosen.ranges.items()}
        body: dict[str, Any] = {
            "name": chosen.handler,
            "payload": {"submission": number, "pad": pad, **chosen.payload, **drawn},
            "priority": chance.randint(0, 9),
        }
        if chosen.delay is not None:
            body["delay_seconds"] = chance.uniform(*chosen.delay)
        return PlannedTask(
            number,
            recipe,
            body,
            hashlib.sha256(pad.encode()).hexdigest()[:16],
            expires_after=chance.uniform(*chosen.expiry) if chosen.expiry else None,
            cancel_after=chance.uniform(*chosen.cancellation) if chosen.cancellation else None,
            redrive_after=chance.uniform(1, 4) if recipe in REDRIVEN else None,
            reads=chance.randint(3, 6) if not in_batch and chance.random() < READ_SHARE else 0,
        )


ONE_BY_ONE = {name: recipe.weight for name, recipe in RECIPES.items()}
IN_BATCHES = {name: recipe.weight_in_batches for name, recipe in RECIPES.items()}
