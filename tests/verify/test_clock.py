"""
Wrong clocks: the time that AsyncFlow reads really is shifted, and the nemesis can verify it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import asyncflow
from asyncflow.verify.clock import Clock
from asyncflow.verify.process import READ_THE_CLOCK_AS_DATETIME

HOUR = 3_600.0
PATIENCE_SECONDS = 600.0
"""Far more than any slow machine needs, and far less than an hour."""

READ_EVERY_CLOCK = """
import sys
from importlib import import_module
from pathlib import Path
from asyncflow.verify import clock
clock.plant(Path(sys.argv[1]))
api = import_module("asyncflow.api.submissions")
clock.plant_in(api)
import time
from asyncflow.domain.task import TaskIds
from asyncflow.telemetry.logs import _timestamp
print(time.time())
print((TaskIds().next().int >> 80) / 1000)
print(api.datetime.now(api.UTC).timestamp())
print(api.datetime.fromisoformat(_timestamp()).timestamp())
"""


def test_what_a_process_reads_is_shifted(tmp_path: Path) -> None:
    """
    The shift applies to `time.time`, the time in a new task's id, the API's clock, and the
    timestamps of log lines.
    """
    clock = Clock(tmp_path / "clock")
    clock.set(HOUR)
    command = [sys.executable, "-c", READ_EVERY_CLOCK, str(clock.file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    ahead = [float(line) - time.time() for line in done.stdout.splitlines()]
    assert 4 == len(ahead)
    assert all(abs(seconds - HOUR) < PATIENCE_SECONDS for seconds in ahead), ahead
    assert clock.readings >= 4
    assert abs(clock.shown_seconds - time.time() - HOUR) < PATIENCE_SECONDS


def test_a_clock_can_jump_while_its_process_runs(tmp_path: Path) -> None:
    """
    The clock of a running process can jump forward and back repeatedly.
    """
    clock = Clock(tmp_path / "clock")
    code = (
        "import sys; from pathlib import Path; from asyncflow.verify import clock; import time;"
        "clock.plant(Path(sys.argv[1]));"
        "[print(time.time(), flush=True) for _ in sys.stdin]"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(clock.file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for offset in (0.0, -HOUR, HOUR, 0.0):
            clock.set(offset)
            process.stdin.write("now?\n")
            process.stdin.flush()
            told = float(process.stdout.readline())
            assert abs(told - time.time() - offset) < PATIENCE_SECONDS
        process.stdin.close()


def test_nothing_reads_a_clock_that_cannot_be_shifted() -> None:
    """
    Modules that call `datetime.now` are listed, and no module imports functions from `time`.
    """
    source = Path(asyncflow.__file__).parent
    asks_datetime, holds_functions = set(), set()
    for file in source.rglob("*.py"):
        module = "asyncflow." + ".".join(file.relative_to(source).with_suffix("").parts)
        if module.startswith(("asyncflow.verify", "asyncflow.cli")):
            continue
        text = file.read_text()
        if re.search(r"datetime\.(now|utcnow|today)\(|date\.today\(", text):
            asks_datetime.add(module)
        if re.search(r"from time import", text):
            holds_functions.add(module)

    assert {m for modules in READ_THE_CLOCK_AS_DATETIME.values() for m in modules} == asks_datetime
    assert set() == holds_functions
