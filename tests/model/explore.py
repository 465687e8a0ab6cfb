"""
Explores everything that can happen, breadth first, and checks each world and each change.

`explore` visits every reachable world and records how it was first reached, which is a shortest
path. Then it walks backwards from the worlds at rest, along steps of progress only: a world that
this walk does not reach can get stuck. The graph is finite and closed under progress, so reaching
all of it says more than "an end can be reached": if each step that stays possible is taken
eventually, every task ends, wherever faults and requests have led.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tests.model.invariants import AT_EVERY_CHANGE, IN_EVERY_WORLD, Change
from tests.model.protocol import Kind, Protocol, Step, World
from tests.model.statements import IllegalMove

EVERYTHING_ENDS = "every task ends and nothing is left over, once nothing goes wrong"
MOVES_ARE_LEGAL = "a statement moves a task only where the table has an arrow"


class Violation(Exception):
    """
    A rule that does not hold, and a shortest path to where it breaks.

    Attributes:
        rule: The rule in words.
        path: The steps from the start.
    """

    def __init__(self, rule: str, path: Sequence[str]) -> None:
        self.rule = rule
        self.path = path
        steps = "\n".join(f"{number:4}. {step}" for number, step in enumerate(path, 1))
        super().__init__(f"Broken: {rule}.\n{steps}")


class Explored(NamedTuple):
    """
    The size of an exploration.

    Attributes:
        depth: The length of the longest shortest path from the start to a world.
    """

    states: int
    steps: int
    depth: int


def explore(protocol: Protocol) -> Explored:
    """
    Visit every reachable world.

    Raises:
        Violation: A rule does not hold.
    """
    return _Exploration(protocol).run()


class _Exploration:
    """
    The state of one exploration. Worlds are numbered in the order they are found.
    """

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        start = protocol.start()
        self._worlds = [start]
        self._numbers = {start: 0}
        self._found_from = [0]
        self._progress_from: list[list[int]] = [[]]
        self._steps = 0

    def run(self) -> Explored:
        for number, world in enumerate(self._worlds):  # The list grows meanwhile.
            try:
                for step in self._protocol.steps(world):
                    self._take(number, world, step)
            except IllegalMove as move:
                raise Violation(MOVES_ARE_LEGAL, [*self._path(number), str(move)]) from move
        self._check_ends()
        return Explored(len(self._worlds), self._steps, len(self._way(len(self._worlds) - 1)))

    def _take(self, number: int, world: World, step: Step) -> None:
        self._steps += 1
        if step.after.rows is not world.rows:
            self._check_changes(number, world, step)
        after = self._protocol.canonical(step.after)
        to = self._numbers.get(after)
        if to is None:
            to = self._add(after, number)
        if step.kind is Kind.PROGRESS:
            self._progress_from[to].append(number)

    def _add(self, world: World, found_from: int) -> int:
        number = self._numbers[world] = len(self._worlds)
        self._worlds.append(world)
        self._found_from.append(found_from)
        self._progress_from.append([])
        for rule, holds in IN_EVERY_WORLD:
            if not holds(world):
                raise Violation(rule, self._path(number))
        return number

    def _check_changes(self, number: int, world: World, step: Step) -> None:
        for before, after in zip(world.rows, step.after.rows, strict=True):
            if before is not after:
                change = Change(before, after, step.lease, world.paused)
                for rule, holds in AT_EVERY_CHANGE:
                    if not holds(change):
                        raise Violation(rule, self._path(number, then=step))

    def _check_ends(self) -> None:
        """
        Walk backwards from the worlds at rest, and raise if that misses a world.
        """
        ends_well = bytearray(len(self._worlds))
        look_at = [n for n, world in enumerate(self._worlds) if self._protocol.is_at_rest(world)]
        while look_at:
            number = look_at.pop()
            if not ends_well[number]:
                ends_well[number] = True
                look_at += self._progress_from[number]
        first_stuck = ends_well.find(False)
        if first_stuck >= 0:
            raise Violation(EVERYTHING_ENDS, self._path(first_stuck))

    def _way(self, number: int) -> list[int]:
        way = []
        while number:
            way.append(number)
            number = self._found_from[number]
        return way[::-1]

    def _path(self, number: int, *, then: Step | None = None) -> list[str]:
        """
        The path replayed from the start, so that each worker keeps its name.
        """
        canonical = self._protocol.canonical
        goals = [self._worlds[to] for to in self._way(number)]
        if then is not None:
            goals.append(canonical(then.after))
        world, path = self._worlds[0], []
        for goal in goals:
            steps = self._protocol.steps(world)
            step = next(step for step in steps if canonical(step.after) == goal)
            world = step.after
            path.append(str(step))
        return path
