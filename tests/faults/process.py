"""
One process that is going to fail: `python -m faults.process FAILPOINT ACTION worker …`.

It plants the failpoint and then runs the command line as it is.
"""

from __future__ import annotations

import os
import runpy
import sys

from tests.faults.failpoints import ACTION, POINT, plant_from_environment


def main() -> None:
    """
    Be `asyncflow` with the rest of the arguments, and fail at the point that the first names.
    """
    os.environ[POINT], os.environ[ACTION] = sys.argv.pop(1), sys.argv.pop(1)
    plant_from_environment(in_child=False)
    runpy.run_module("asyncflow", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
