"""
One process of a run that is not as it should be:
`python -m asyncflow.verify.process CLOCK MUTANT worker …`.

It goes by the wrong clock of a file, has a known bug, or both; `-` stands for neither. This is
the only door to the mutants. What remains is the command line as it is.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path

from asyncflow.verify import clock

RIGHT = "-"
READ_THE_CLOCK_AS_DATETIME = {"api": ("asyncflow.api.submissions",)}
"""Modules that call `datetime.now`, by the process they run in."""


def main() -> None:
    """
    Be `asyncflow` with what follows the first two arguments.
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
    runpy.run_module("asyncflow", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
