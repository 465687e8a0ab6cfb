"""
Handlers in child processes, which can be killed.
"""

from __future__ import annotations

import asyncio

from asyncflow.domain.outcome import Outcome
from asyncflow.errors import ChildNotStarted
from asyncflow.handlers.context import Progress
from asyncflow.worker.isolation.child import Child
from asyncflow.worker.isolation.run import OutsideRun


class ChildRun(OutsideRun):
    """
    A handler in a child process. The child reports here, see `child.ChildListener`.
    """

    _child: Child | None = None
    _is_killed = False
    _entering: asyncio.Task[None]

    def enter(self) -> None:
        self._entering = asyncio.get_running_loop().create_task(self._enter_child())

    async def _enter_child(self) -> None:
        try:
            child = await self.means.children.lend()
        except ChildNotStarted as error:
            return self.conclude(self.not_entered(str(error)))
        self.means.shortage.pass_by()
        if self.is_stopping:
            self.means.children.take_back(child)
            return self.conclude(self.ended_unentered())
        self._child = child
        # What it took to start a process is no part of the attempt.
        self.context.start_clock()
        self.start_clock()
        child.run(
            self.handler,
            self.payload,
            self.context,
            self,
            bytes_max=self.means.result_bytes_max,
        )

    def progressed(self, progress: Progress) -> None:
        self.context.progress(progress.fraction, progress.message)

    def child_ended(self, outcome: Outcome, *, stop_seen: bool) -> None:
        self._let_go_of_child()
        self.conclude(self.ended(outcome, stop_seen=stop_seen))

    def child_died(self, end: Outcome, *, was_entered: bool) -> None:
        self._let_go_of_child()
        if self._is_killed:
            self.end()
            grace = self.means.cancel_grace_seconds
            self.conclude(self.stopped(None, f"It did not stop within {grace:g} s and was killed."))
        elif was_entered or self.is_stopping:
            self.conclude(self.ended(end, stop_seen=True))
        else:
            # A warm child may die in the moment it is lent. Then the handler was not entered
            # and the task is not to blame: another child gets it.
            self.enter()

    def ask_to_stop(self) -> None:
        if self._child is not None:
            self._child.ask_to_stop()

    def stop_at_once(self) -> None:
        self.give_up()

    def give_up(self) -> None:
        if self._child is None:
            return self.conclude(self.ended_unentered())
        self._is_killed = True
        self._child.kill()

    def abandon(self) -> None:
        child = self._child
        if child is not None:
            child.kill()

    def _let_go_of_child(self) -> None:
        child, self._child = self._child, None
        assert child is not None
        self.means.children.take_back(child)
