"""
The command line of `bin/bench`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.entrants import ENTRANTS, OURS, PEERS, Entrant
from bench.environment import describe
from bench.lines import read_lines
from bench.report import write_report
from bench.run import Run, Sizes
from bench.scenarios import SCENARIOS
from bench.services import running_services

REPOSITORY = Path(__file__).parents[1]

FULL = Sizes(share=1.0, repetitions=3, minutes=10.0, finished=10_000_000)
QUICK = Sizes(share=0.4, repetitions=1, minutes=0.5, finished=2_000_000)

RESULTS = REPOSITORY / "bench" / "results"
DOCS = REPOSITORY / "docs"


def main() -> None:
    """
    Measure, write raw lines, and generate the report from them.
    """
    options = _options()
    # Exit as on Ctrl-C, so that no server or worker is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.report:
        folder = options.report
        if not (folder / "raw.jsonl").exists():
            raise SystemExit(f"bench: there are no raw lines in {folder}")
    else:
        folder = options.into or RESULTS / time.strftime("%Y%m%d-%H%M%S")
        _measure(options, folder.absolute())
    pages = DOCS if options.publish else folder
    print(f"bench: the report is {write_report(folder / 'raw.jsonl', pages)}")


def _measure(options: argparse.Namespace, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_lines(folder / "raw.jsonl")
    sizes = _sizes(options)
    if earlier.environment and not sizes.measure_the_same_as(earlier.environment["sizes"]):
        raise SystemExit(f"bench: {folder} was measured with {earlier.environment['sizes']}")
    os.chdir(REPOSITORY)
    entrants = _entrants(options)
    with running_services(with_broker=any(e.needs_broker for e in entrants)) as services:
        if services.broker is None:
            entrants = [entrant for entrant in entrants if not entrant.needs_broker]
        run = Run(
            services,
            folder,
            entrants=entrants,
            sizes=sizes,
            profiles=options.profile,
            earlier=earlier,
        )
        run.write_down(describe(run, sys.argv[1:]))
        for name in options.only or SCENARIOS:
            run.carry_out(name, SCENARIOS[name].measurements(run))


def _entrants(options: argparse.Namespace) -> Sequence[Entrant]:
    if options.systems:
        return [ENTRANTS[key] for key in options.systems]
    return OURS if options.without_peers else (*OURS, *PEERS)


def _sizes(options: argparse.Namespace) -> Sizes:
    usual = QUICK if options.quick else FULL
    return Sizes(
        share=usual.share,
        repetitions=options.repeat or usual.repetitions,
        minutes=options.minutes or usual.minutes,
        finished=usual.finished,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bin/bench", description="Measure AsyncFlow and peers.")
    parser.add_argument("--quick", action="store_true", help="fewer tasks, once each")
    parser.add_argument(
        "--only", nargs="+", metavar="SCENARIO", choices=SCENARIOS, help=", ".join(SCENARIOS)
    )
    parser.add_argument(
        "--systems", nargs="+", metavar="SYSTEM", choices=ENTRANTS, help=", ".join(ENTRANTS)
    )
    parser.add_argument("--without-peers", action="store_true", help="only AsyncFlow")
    parser.add_argument("--repeat", type=int, help="repetitions of each measurement")
    parser.add_argument("--minutes", type=float, help="length of the sustained load")
    parser.add_argument("--profile", action="store_true", help="sample with py-spy; slows")
    parser.add_argument(
        "--publish", action="store_true", help="write the report into docs/, not next to the lines"
    )
    parser.add_argument(
        "--into",
        type=Path,
        metavar="FOLDER",
        help="go on with a run: measure what is not in this folder yet",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="measure nothing; the report of what is in this folder",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
