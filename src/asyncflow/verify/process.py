"""
One process of a run: `python -m asyncflow.verify.process CLOCK MUTANT worker …`.

It reads the wrong clock of a file, has a known bug, or both; `-` stands for none. Mutants are
planted only here. A signal makes the process block. Otherwise it is the normal command line.
"""

from __future__ import annotations

import runpy
import signal
import sys
import time
from importlib import import_module
from pathlib import Path

from asyncflow.verify import clock

RIGHT = "-"
STAND_STILL = signal.SIGUSR1
STEP_SECONDS = 60.0
READ_THE_CLOCK_AS_DATETIME = {"api": ("asyncflow.api.submissions",)}
"""Modules that call `datetime.now`, by the process that uses them."""


def main() -> None:
    """
    Run `asyncflow` with the arguments after the first two.
    """
    file, mutant = sys.argv.pop(1), sys.argv.pop(1)
    if file != RIGHT:
        clock.plant(Path(file))
        for role, modules in READ_THE_CLOCK_AS_DATETIME.items():
            if role in sys.argv:
                for module in modules:
                    clock.plant_in(import_module(module))
    if mutant != RIGHT:
        from asyncflow.verify.mutants import MUTANTS

        MUTANTS[mutant].plant()
    signal.signal(STAND_STILL, _stand_still)
    runpy.run_module("asyncflow", run_name="__main__", alter_sys=True)


def _stand_still(*_: object) -> None:
    """
    Never return, and so block the event loop like a handler that never awaits.
    """
    while True:
        time.sleep(STEP_SECONDS)


if __name__ == "__main__":
    main()
