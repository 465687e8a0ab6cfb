"""
The context that scenarios run in, and how measurements are carried out and recorded.

Each measurement writes one raw line when it is done, so that an interrupted run still gives a
report and can be resumed. Measurements of a scenario are interleaved: every system once, then every
system again, so that a drift in the machine's speed affects all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench.addresses import PROBE, VARIANT
from bench.entrants import Entrant
from bench.lines import Lines
from bench.probe import Probe
from bench.processes import Processes, running
from bench.services import Services
from bench.systems import System, load_system

PRODUCE_SECONDS_MAX = 900
START_SECONDS_MAX = 30.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """
    How much is measured.

    Attributes:
        share: Fraction of the tasks of a full run.
        repetitions: Number of repetitions of each measurement that a target or a comparison needs.
        minutes: Duration of the sustained load on PostgreSQL.
        finished: Number of finished tasks in the scenario with a long history.
    """

    share: float
    repetitions: int
    minutes: float
    finished: int

    def measure_the_same_as(self, other: Mapping[str, Any]) -> bool:
        """
        Whether figures may share a report with those of a run of the other sizes; only repetitions
        may differ.
        """
        return asdict(self) | {"repetitions": 0} == {**other, "repetitions": 0}


class Measurement(NamedTuple):
    """
    One thing to measure: which system, in which case, and how.

    Attributes:
        case: What distinguishes it from the system's other measurements in the scenario.
        once: Whether it is measured in the first repetition only, because it is expensive and no
            target depends on it.
    """

    entrant: Entrant
    case: Mapping[str, Any]
    measure: Callable[[], Mapping[str, Any]]
    once: bool = False


class Run:
    """
    One run of the benchmark.

    Attributes:
        folder: Where the raw lines, logs and profiles go.
        entrants: The systems that take part.
        earlier: Lines already in this folder, which are not measured again.
    """

    def __init__(
        self,
        services: Services,
        folder: Path,
        *,
        entrants: Sequence[Entrant],
        sizes: Sizes,
        profiles: bool,
        earlier: Lines,
    ) -> None:
        self.services = services
        self.folder = folder
        self.entrants = entrants
        self.sizes = sizes
        self.profiles = profiles
        self.earlier = earlier
        self.probe = Probe(folder / "probe")

    def tasks(self, full: int) -> int:
        """
        Number of tasks to use where a full run uses `full`.
        """
        return max(100, round(full * self.sizes.share / 100) * 100)

    def carry_out(self, scenario: str, measurements: Sequence[Measurement]) -> None:
        """
        Carry out and record all measurements, interleaved.

        Raises:
            SystemExit: A measurement failed; that is recorded too, and the message says how to
                continue.
        """
        for repetition in range(1, self.sizes.repetitions + 1):
            for entrant, case, measure, once in measurements:
                if once and repetition > 1:
                    continue
                if self.earlier.has(scenario, entrant.key, case, repetition):
                    continue
                load_before = os.getloadavg()[0]
                started = time.time()
                failure: Exception | None = None
                values: Mapping[str, Any]
                try:
                    values = measure()
                except Exception as error:
                    traceback.print_exc()
                    failure = error
                    values = {"error": repr(error)}
                self.write_down(
                    {
                        "scenario": scenario,
                        "system": entrant.key,
                        "case": dict(case),
                        "repetition": repetition,
                        **values,
                        "at": round(started),
                        "took_seconds": round(time.time() - started, 1),
                        "load_before": round(load_before, 2),
                    }
                )
                if failure is not None:
                    raise SystemExit(
                        f"bench: {scenario} of {entrant.key} failed: {failure!r}. "
                        f"What it printed is in {self.log(entrant)}. Repeat the command with "
                        f"--into {self.folder} to go on, or with --systems to leave it out."
                    ) from None

    def write_down(self, line: Mapping[str, Any]) -> None:
        """
        Append one raw line and print it.
        """
        text = json.dumps(line)
        with (self.folder / "raw.jsonl").open("a") as raw:
            raw.write(text + "\n")
        print(text, flush=True)

    def prepare(self, entrant: Entrant) -> System:
        """
        Give a system a new database, new queues, and its tables.
        """
        self.probe.reset()
        self.services.renew()
        # This process asks the systems about their progress, and they read these variables.
        os.environ.update(self.environment(entrant))
        self.produce(entrant, "prepare")
        return load_system(entrant.system)

    def environment(self, entrant: Entrant) -> dict[str, str]:
        """
        The environment of a process of this system.
        """
        return {
            **self.services.environment,
            PROBE: str(self.probe.file),
            VARIANT: entrant.variant,
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def produce(self, entrant: Entrant, *arguments: object, **environment: str) -> float:
        """
        Run `bench.produce` to its end and return the rate it prints.
        """
        producing = self.start_producing(entrant, *arguments, **environment)
        return finish_producing(producing)

    def start_producing(
        self, entrant: Entrant, *arguments: object, **environment: str
    ) -> subprocess.Popen[str]:
        """
        Start `bench.produce` alongside what already runs.
        """
        with self.log(entrant).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "bench.produce", entrant.system, *map(str, arguments)],
                env={**os.environ, **self.environment(entrant), **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def log(self, entrant: Entrant) -> Path:
        """
        The file for all output of a system.
        """
        return self.folder / f"{entrant.key}.log"

    def wait_for_workers(self, processes: Processes, *, count: int = 1) -> None:
        """
        Wait until `count` worker processes have run a task.
        """

        def have_begun() -> bool:
            processes.check()
            return len(self.probe.slots()) >= count

        wait_until(have_begun, seconds=START_SECONDS_MAX)

    @contextmanager
    def workers(
        self, entrant: Entrant, system: System, *, processes: int, concurrency: str
    ) -> Iterator[Processes]:
        """
        Run a system's workers until the end of the block.
        """
        commands = system.worker_commands(processes, concurrency)
        with running(
            commands, environment=self.environment(entrant), log=self.log(entrant)
        ) as workers:
            yield workers


def finish_producing(producing: subprocess.Popen[str]) -> float:
    """
    Wait until a producer exits and return the rate it printed.
    """
    output, _ = producing.communicate(timeout=PRODUCE_SECONDS_MAX)
    if producing.returncode != 0:
        raise RuntimeError(f"{producing.args!r} failed with {producing.returncode}")
    return float(output.strip().splitlines()[-1])


def wait_until(
    condition: Callable[[], bool], *, seconds: float, poll_seconds: float = 0.005
) -> None:
    """
    Wait until `condition` holds.

    Raises:
        TimeoutError: The condition does not hold within `seconds`.
    """
    deadline = time.perf_counter() + seconds
    while not condition():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"nothing came of it within {seconds} seconds")
        time.sleep(poll_seconds)


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """
    p50, p95, p99 and the largest, in milliseconds; empty for no values.
    """
    values = sorted(seconds)
    if not values:
        return {}

    def at(share: float) -> float:
        return round(1_000 * values[min(len(values) - 1, int(share * len(values)))], 3)

    return {
        "p50_ms": at(0.50),
        "p95_ms": at(0.95),
        "p99_ms": at(0.99),
        "max_ms": round(1_000 * values[-1], 3),
    }
