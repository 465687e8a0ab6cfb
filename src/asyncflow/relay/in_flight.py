"""
Tasks in flight: RabbitMQ has confirmed their hints, and they are not marked as queued yet.

A mark costs PostgreSQL as much as a claim, and tasks that travel in packs are claimed within
milliseconds. So their marks wait a moment, and are never made for tasks that have moved on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from uuid import UUID

from asyncflow.store.due import Admitted


class InFlight:
    """
    The tasks of one queue that are in flight. Forgetting one is always safe: if it is still
    pending, its hint is sent again.
    """

    def __init__(self) -> None:
        self._attempts: dict[UUID, int] = {}
        self._sent: deque[tuple[float, list[Admitted]]] = deque()

    def __len__(self) -> int:
        return len(self._attempts)

    def __contains__(self, task: Admitted) -> bool:
        # Another attempt needs another hint.
        return self._attempts.get(task.task_id) == task.attempt

    def add(self, sent: list[Admitted], *, now: float) -> None:
        """
        Remember hints that were sent just now.
        """
        self._attempts.update((task.task_id, task.attempt) for task in sent)
        self._sent.append((now, sent))

    def put_back(self, tasks: list[Admitted]) -> None:
        """
        Remember tasks that could not be marked; the next `pop` takes them out first.
        """
        self._attempts.update((task.task_id, task.attempt) for task in tasks)
        self._sent.appendleft((-math.inf, tasks))

    def keep(self, pending: Sequence[Admitted]) -> None:
        """
        Forget every task that is not among the `pending` ones.
        """
        self._attempts = {task.task_id: task.attempt for task in pending if task in self}

    def forget(self, task_ids: Sequence[UUID]) -> None:
        """
        Forget these tasks: their hints are gone.
        """
        for task_id in task_ids:
            self._attempts.pop(task_id, None)

    def clear(self) -> None:
        """
        Forget every task.
        """
        self._attempts.clear()
        self._sent.clear()

    def pop(self, *, before: float) -> list[Admitted]:
        """
        Take out the tasks whose hints were sent no later than `before`.
        """
        taken: list[Admitted] = []
        while self._sent and self._sent[0][0] <= before:
            _, sent = self._sent.popleft()
            for task in sent:
                if task in self:
                    del self._attempts[task.task_id]
                    taken.append(task)
        return taken
