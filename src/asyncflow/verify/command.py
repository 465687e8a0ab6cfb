"""
The command `asyncflow verify`.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from asyncflow.errors import EmbeddedDatabaseError, NoBroker

if TYPE_CHECKING:
    from asyncflow.verify.run import Plan

MINUTES_MIN, MINUTES_MAX = 0.05, 600.0
RATE_MIN, RATE_MAX = 1.0, 5_000.0
INVALID = 3
MUTANT_DRAIN_SECONDS = 6.0


@click.command()
@click.option(
    "--minutes",
    type=click.FloatRange(MINUTES_MIN, MINUTES_MAX),
    default=5.0,
    show_default=True,
    help="Duration of the faults; each kind is injected at least once.",
)
@click.option("--seed", type=int, help="Seed of workload and faults. Default: random.")
@click.option(
    "--engine",
    type=click.Choice(["postgres", "rabbitmq"]),
    help="What delivers tasks to workers. Default: rabbitmq with --broker-url, else postgres.",
)
@click.option(
    "--calm",
    type=click.FloatRange(0, 600),
    default=2.0,
    show_default=True,
    help="Seconds before the first fault.",
)
@click.option(
    "--broker-url",
    metavar="URL",
    help="Use this RabbitMQ, amqp://user:password@host:port. Default: start rabbitmq-server.",
)
@click.option(
    "--management-url",
    metavar="URL",
    help="URL of its management plugin. Default: port 15672 of the same host.",
)
@click.option(
    "--rate",
    type=click.FloatRange(RATE_MIN, RATE_MAX),
    default=100.0,
    show_default=True,
    help="Tasks submitted per second, many of them in batches.",
)
@click.option("--faults", metavar="KIND,…", help="Inject only these kinds of faults, or `none`.")
@click.option("--mutant", metavar="NAME", help="Run with a known bug, which the checker must find.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="New folder for histories and report."
)
def verify(
    minutes: float,
    seed: int | None,
    engine: str | None,
    calm: float,
    broker_url: str | None,
    management_url: str | None,
    rate: float,
    faults: str | None,
    mutant: str | None,
    output: Path | None,
) -> None:
    """
    Test the guarantees by fault injection, on servers and processes of its own.

    Exit status: 0 every guarantee held, 1 one was violated, 3 the run proves nothing.
    """
    from asyncflow.verify.run import Plan

    if engine == "postgres" and broker_url is not None:
        raise click.BadParameter("needs --engine rabbitmq", param_hint="--broker-url")
    plan = Plan(
        folder=_new_folder(output),
        seed=time.time_ns() % 1_000_000 if seed is None else seed,
        seconds=60 * minutes,
        engine=engine or ("postgres" if broker_url is None else "rabbitmq"),
        calm_seconds=calm,
        rate=rate,
        kinds=_kinds(faults),
        mutant=mutant,
        broker_url=broker_url,
        management_url=management_url,
    )
    if mutant is not None:
        plan = _as_needed_for(mutant, plan)
    sys.exit(_carried_out(plan))


def _carried_out(plan: Plan) -> int:
    import uvloop

    from asyncflow.verify import report
    from asyncflow.verify.run import run

    click.echo(
        f"Seed {plan.seed}, {plan.seconds:g} s of faults; histories in {plan.folder}", err=True
    )
    try:
        uvloop.run(run(plan, say=partial(click.echo, err=True)))
        verdict, text = report.write(plan.folder)
    except (EmbeddedDatabaseError, NoBroker):
        raise
    except Exception:
        # An error of the harness must not look like a violation.
        click.echo(f"The run failed:\n{traceback.format_exc()}", err=True)
        return INVALID
    click.echo(text)
    return verdict.status


def _new_folder(output: Path | None) -> Path:
    folder = output or Path(tempfile.mkdtemp(prefix="asyncflow-verify-"))
    if folder.exists() and any(folder.iterdir()):
        raise click.BadParameter(f"{folder} is not empty", param_hint="--output")
    return folder.absolute()


def _kinds(faults: str | None) -> list[str] | None:
    from asyncflow.verify.faults import FAULTS

    if faults is None:
        return None
    kinds = [kind for kind in faults.split(",") if kind and kind != "none"]
    for kind in kinds:
        if kind not in FAULTS:
            raise click.BadParameter(
                f"unknown kind {kind!r}; one of: {', '.join(FAULTS)}, none", param_hint="--faults"
            )
    return kinds


def _as_needed_for(name: str, plan: Plan) -> Plan:
    """
    The plan with the faults, load, engine and time limits that expose a known bug.
    """
    from asyncflow.verify.mutants import MUTANTS

    if name not in MUTANTS:
        raise click.BadParameter(
            f"unknown mutant; one of: {', '.join(MUTANTS)}", param_hint="--mutant"
        )
    mutant = MUTANTS[name]
    return replace(
        plan,
        kinds=mutant.faults if plan.kinds is None else plan.kinds,
        seconds=mutant.seconds,
        rate=mutant.rate,
        engine="rabbitmq" if mutant.engine == "rabbitmq" else plan.engine,
        drain_seconds=MUTANT_DRAIN_SECONDS,
    )
