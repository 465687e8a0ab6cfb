"""
The process that is made to fail: `python -m faults.process FAILPOINT ACTION worker …`.

It plants the failpoint and then runs the command line unchanged.
"""

from __future__ import annotations

import os
import runpy
import sys

from tests.faults.failpoints import ACTION, POINT, plant_from_environment


def main() -> None:
    """
    Run `asyncflow` with the remaining arguments, and fail at the failpoint named by the first.
    """
    os.environ[POINT], os.environ[ACTION] = sys.argv.pop(1), sys.argv.pop(1)
    plant_from_environment(in_child=False)
    runpy.run_module("asyncflow", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
