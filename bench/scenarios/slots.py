"""
One worker with 10 slots on tasks that wait 20 ms, 0.1 s and 0.5 s: are its slots kept busy?

No-ops travel in bulk, and tasks of seconds leave plenty of time. In between are tasks for which the
supply can easily be too slow.
"""

from __future__ import annotations

from functools import partial

from bench.run import Measurement, Run
from bench.scenarios.waiting import measure
from bench.systems.asyncflow import WAIT_SECONDS

NAME = "slots"

SLOTS = 10
WAITS_SECONDS = (0.02, 0.1, 0.5)


def measurements(run: Run) -> list[Measurement]:
    """
    Both engines of AsyncFlow.
    """
    return [
        Measurement(
            entrant,
            {"wait_seconds": seconds},
            partial(
                measure,
                run,
                entrant,
                slots=SLOTS,
                wait_seconds=seconds,
                ramp_seconds=1.0,
                window_seconds=6.0,
                environment={WAIT_SECONDS: str(seconds)},
            ),
        )
        for seconds in WAITS_SECONDS
        for entrant in run.entrants
        if entrant.is_ours
    ]
