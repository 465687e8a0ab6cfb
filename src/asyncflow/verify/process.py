"""
One process of a run that shall go wrong: `python -m asyncflow.verify.process MUTANT worker …`.

The only door to the mutants. It plants one and then runs the command line as it is.
"""

from __future__ import annotations

import runpy
import sys

from asyncflow.verify.mutants import MUTANTS


def main() -> None:
    """
    Plant the bug that the first argument names, and be `asyncflow` with the rest.
    """
    MUTANTS[sys.argv.pop(1)].plant()
    runpy.run_module("asyncflow", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
