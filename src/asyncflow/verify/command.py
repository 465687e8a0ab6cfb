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
    help="How long faults happen; each kind comes once at least.",
)
@click.option("--seed", type=int, help="Which tasks and faults; drawn if left out.")
@click.option(
    "--engine",
    type=click.Choice(["postgres", "rabbitmq"]),
    help="What carries the tasks to the workers; postgres unless a broker is given.",
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
    help="A RabbitMQ to use, amqp://user:password@host:port; otherwise rabbitmq-server is started.",
)
@click.option(
    "--management-url",
    metavar="URL",
    help="Where its management plugin answers; port 15672 of the same host if left out.",
)
@click.option(
    "--rate",
    type=click.FloatRange(RATE_MIN, RATE_MAX),
    default=100.0,
    show_default=True,
    help="Tasks to submit per second; many come in batches.",
)
@click.option("--faults", metavar="KIND,…", help="Only these kinds; `none` for none.")
@click.option("--mutant", metavar="NAME", help="Plant a known bug, to see that it is found.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="A new folder for histories and report."
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
    Try to make AsyncFlow lose a task, on servers and processes of its own.

    Exit status: 0 every promise was kept, 1 one was broken, 3 the run proves nothing.
    """
    from asyncflow.verify.run import Plan

    if engine == "postgres" and broker_url is not None:
        raise click.BadParameter("it goes with --engine rabbitmq", param_hint="--broker-url")
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
        # Ours, not AsyncFlow's: it must not look like a broken promise.
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
                f"{kind!r} is none of: {', '.join(FAULTS)}, none", param_hint="--faults"
            )
    return kinds


def _as_needed_for(name: str, plan: Plan) -> Plan:
    """
    The plan with the faults, the load, the patience and the engine that bring out a known bug.
    """
    from asyncflow.verify.mutants import MUTANTS

    if name not in MUTANTS:
        raise click.BadParameter(f"it is none of: {', '.join(MUTANTS)}", param_hint="--mutant")
    mutant = MUTANTS[name]
    return replace(
        plan,
        kinds=mutant.faults if plan.kinds is None else plan.kinds,
        seconds=mutant.seconds,
        rate=mutant.rate,
        engine="rabbitmq" if mutant.engine == "rabbitmq" else plan.engine,
        drain_seconds=MUTANT_DRAIN_SECONDS,
    )
