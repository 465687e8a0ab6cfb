"""
Profiles a measurement with py-spy, and summarises where the time is spent.

A sample is attributed to the innermost frame of a known owner, so that time in the standard library
counts towards its caller. Only for runs with `--profile`: sampling slows them down.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.addresses import program
from bench.run import Run

SAMPLES_PER_SECOND = 250
LINES = 40
COMMON = 0.95


@contextmanager
def profile(run: Run, name: str, pids: Sequence[int]) -> Iterator[None]:
    """
    Sample processes while the block runs, if profiling was requested.

    Writes `profile-NAME-0.folded` for flame graphs and `profile-NAME-0.json`, and so on.
    """
    files = [
        run.folder / f"profile-{name}-{number}.folded".replace(" ", "-")
        for number in range(len(pids))
    ]
    recordings = [_record(*pair) for pair in zip(pids, files, strict=True) if run.profiles]
    try:
        yield
    finally:
        for recording in recordings:
            recording.send_signal(signal.SIGINT)  # py-spy then writes what it has.
        for recording in recordings:
            recording.wait()
    for file in files:
        if file.exists():
            file.with_suffix(".json").write_text(json.dumps(summary(file), indent=1) + "\n")


def _record(pid: int, file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [program("py-spy"), "record", "--pid", str(pid), "--rate", str(SAMPLES_PER_SECOND)]
        + ["--format", "raw", "--output", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def summary(folded: Path) -> dict[str, Any]:
    """
    Shares of the samples in percent: by owner, by innermost function, and inclusive.
    """
    owners: Counter[str] = Counter()
    leaves: Counter[str] = Counter()
    inclusive: Counter[str] = Counter()
    total = 0
    for line in folded.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        count = int(samples)
        frames = [re.sub(r":\d+\)$", ")", frame) for frame in stack.split(";")]
        if "selectors.py" in frames[-1]:
            continue  # A second thread that is waiting; py-spy mistakes it for busy.
        total += count
        owners[next(filter(None, map(_owner, reversed(frames))), "Python and the loop")] += count
        leaves[frames[-1]] += count
        for frame in set(frames):
            inclusive[frame] += count

    def shares(counter: Counter[str]) -> dict[str, float]:
        # Functions common to nearly every stack carry no information.
        telling = [(name, n) for name, n in counter.most_common() if n < COMMON * total]
        return {name: round(100 * n / total, 1) for name, n in telling[:LINES]}

    return {
        "samples": total,
        "owners": shares(owners),
        "innermost": shares(leaves),
        "inclusive": shares(inclusive),
    }


def _owner(frame: str) -> str | None:
    if found := re.search(r"\((?:.*/)?(asyncflow/[\w/]+)\.py", frame):
        return found[1]
    if found := re.search(r"site-packages/(\w+)", frame):
        return found[1]
    return None
