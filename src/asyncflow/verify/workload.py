"""
What is submitted: tasks of a dozen kinds, drawn by seed.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Planned:
    """
    One task to submit and what its client does afterwards.

    Attributes:
        number: Travels in the payload, so that every row can be traced to its submission.
        recipe: The kind of task, for the checker.
        body: Of `POST /tasks`.
        digest: Of the payload's text, as the result must carry it.
        cancel_after: Seconds after the 202 to cancel it; None leaves it alone.
        redrive_after: Seconds after the 202 to ask for a redrive; None never does.
        reads: How often its client looks at it.
    """

    number: int
    recipe: str
    body: dict[str, Any]
    digest: str
    cancel_after: float | None = None
    redrive_after: float | None = None
    reads: int = 0


@dataclass(slots=True)
class Recipe:
    """
    How often a kind of task comes, and what it is.
    """

    weight: float
    handler: str
    payload: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)


class Workload:
    """
    An endless supply. The same seed plans the same tasks in the same order.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"workload {seed}")
        self._numbers = itertools.count(1)

    def next(self) -> Planned:
        """
        The next task.
        """
        chance = self._random
        recipes = self._recipes()
        recipe = chance.choices(list(recipes), [r.weight for r in recipes.values()])[0]
        chosen = recipes[recipe]
        number = next(self._numbers)
        pad = chance.randbytes(chance.randint(0, 200)).hex()
        body = {
            "name": chosen.handler,
            "payload": {"submission": number, "pad": pad, **chosen.payload},
            "priority": chance.randint(0, 9),
            **chosen.more,
        }
        digest = hashlib.sha256(pad.encode()).hexdigest()[:16]
        return Planned(
            number,
            recipe,
            body,
            digest,
            cancel_after=chance.uniform(0, 2) if recipe.startswith("cancel") else None,
            redrive_after=chance.uniform(1, 4) if recipe in REDRIVEN else None,
            reads=chance.randint(3, 6) if chance.random() < READ_SHARE else 0,
        )

    def _recipes(self) -> dict[str, Recipe]:
        chance = self._random
        return {
            "noop": Recipe(50, "verify.sleep"),
            "sleep": Recipe(15, "verify.sleep", {"seconds": chance.uniform(0.005, 0.2)}),
            "long": Recipe(4, "verify.sleep", {"seconds": chance.uniform(2, 6)}),
            "fail": Recipe(7, "verify.fail", {"times": chance.randint(1, 3)}),
            "doom": Recipe(2, "verify.doom"),
            "crunch": Recipe(1, "verify.crunch", {"seconds": chance.uniform(0.05, 0.2)}),
            "exit": Recipe(0.7, "verify.exit"),
            "stubborn": Recipe(0.3, "verify.stubborn"),
            "big": Recipe(1, "verify.big"),
            "delayed": Recipe(6, "verify.sleep", more={"delay_seconds": chance.uniform(0.5, 5)}),
            "cancel": Recipe(4, "verify.sleep", {"seconds": chance.uniform(0, 2)}),
            "cancel-failing": Recipe(
                3, "verify.fail", {"times": 3, "seconds": chance.uniform(0.1, 0.6)}
            ),
            "cancel-delayed": Recipe(2, "verify.sleep", more={"delay_seconds": 2.0}),
        }


REDRIVEN = frozenset({"doom", "exit"})
READ_SHARE = 0.1
