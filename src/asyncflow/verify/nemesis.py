"""
The nemesis: injects one fault after another, sometimes two at a time, and records their effect.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence

from asyncflow.verify.broker import Broker
from asyncflow.verify.faults import FAULTS, Bite, Fault, Stage
from asyncflow.verify.fleet import Member
from asyncflow.verify.history import History
from asyncflow.verify.role import give_back

PAIRED_SHARE = 0.25


def planned(
    kinds: Sequence[str] | None, *, broker: Broker | None, chance: random.Random
) -> list[Fault]:
    """
    One round: every fault that this run supports, or those of `kinds`, in an order by seed.
    """
    able = _able(broker)
    faults = [fault for fault in FAULTS.values() if fault.needs in able]
    if kinds is not None:
        faults = [fault for fault in faults if fault.kind in kinds]
    chance.shuffle(faults)
    return faults


def _able(broker: Broker | None) -> set[str]:
    """
    The needs of faults that a run with this broker meets.
    """
    if broker is None:
        return {""}
    return {"", "broker", "own-broker"} if broker.is_ours else {"", "broker"}


class Nemesis:
    """
    Works through rounds of faults until its time is up.
    """

    def __init__(
        self,
        stage: Stage,
        history: History,
        *,
        chance: random.Random,
        rest: tuple[float, float],
        say: Callable[[str], None],
    ) -> None:
        self._stage = stage
        self._history = history
        self._chance = chance
        self._rest = rest
        self._say = say

    async def run(self, kinds: Sequence[str] | None, *, seconds: float) -> None:
        """
        Inject faults until time is up and the last one is healed.

        The first round is always completed: a run without a planned fault would prove nothing.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        is_first_round = True
        faults = planned(kinds, broker=self._stage.broker, chance=self._chance)
        while faults and (is_first_round or loop.time() < until):
            together = [faults.pop(0)]
            if faults and _go_together(together[0], faults[0]):
                if self._chance.random() < PAIRED_SHARE:
                    together.append(faults.pop(0))
            await asyncio.gather(*self._harms(together))
            await asyncio.sleep(self._chance.uniform(*self._rest))
            if not faults:
                is_first_round = False
                faults = planned(kinds, broker=self._stage.broker, chance=self._chance)
        await self._heal()

    async def _heal(self) -> None:
        # Undo what a fault that failed may have left behind.
        for member in self._stage.fleet.members:
            member.send(signal.SIGCONT)
            for wire in member.wires.values():
                wire.release()
        await asyncio.to_thread(self._stage.cluster.start)
        await give_back(self._stage.cluster.url)
        if self._stage.broker is not None:
            await self._stage.broker.start()

    def _harms(self, faults: Sequence[Fault]) -> list[Awaitable[None]]:
        free = [*self._stage.fleet.members]
        harms: list[Awaitable[None]] = []
        for fault in faults:
            victims = [m for m in free if m.role in fault.roles] or free
            victim = self._chance.choice(victims)
            free.remove(victim)
            harms.append(self._harm(fault, victim))
        return harms

    async def _harm(self, fault: Fault, victim: Member) -> None:
        target = fault.server or victim.name
        pid = victim.process.pid if fault.roles and victim.process else None
        self._history.write("fault.start", kind=fault.kind, target=target, pid=pid)
        began = time.monotonic()
        try:
            bite = await fault.harm(self._stage, victim, self._chance)
        except Exception as error:
            # An overlapping fault can take this one's target away.
            bite = Bite(0, f"missed: {error!r}")
        self._history.write(
            "fault.end",
            kind=fault.kind,
            target=target,
            pid=pid,
            seconds=time.monotonic() - began,
            evidence=bite.count,
            detail=bite.detail,
        )
        self._say(f"{fault.kind} {target}: {bite.detail}")


def _go_together(one: Fault, other: Fault) -> bool:
    # Two faults on the same server would interfere with each other.
    return not one.server or one.server != other.server
