"""
POST over HTTP at 1, 32 and 128 connections to one API process: AsyncFlow and the naive one.

The same JSON for both. For AsyncFlow a worker has published the handler beforehand, so the
payload is checked against its schema. `batch` posts 100 tasks per request.
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import partial
from typing import Any

from bench.addresses import program
from bench.entrants import Entrant
from bench.http_load import BATCH, BATCH_CONNECTIONS, post_for
from bench.processes import running
from bench.profiles import profile
from bench.run import Measurement, Run, wait_until
from bench.systems import count_rows, load_system
from bench.systems.asyncflow import environment
from tests.support.ports import free_port

NAME = "http"

WARM_UP_SECONDS = 1.0
SECONDS = 6.0
COMPARED_CONNECTIONS = 32
"""Connections at which a target compares with naive; elsewhere naive is measured once."""

TASK = {
    "name": "bench-noop",
    "payload": {"number": -1, "submitted_at": 0.0, "text": "https://example.com/x"},
}


def measurements(run: Run) -> list[Measurement]:
    """
    One task per request for both systems, batches for AsyncFlow.
    """
    servers = [e for e in run.entrants if e.key in ("asyncflow", "naive")]
    singles = [
        Measurement(
            entrant,
            {"connections": connections, "tasks_per_request": 1},
            partial(measure, run, entrant, connections, 1),
            once=not entrant.is_ours and connections != COMPARED_CONNECTIONS,
        )
        for connections in (1, 32, 128)
        for entrant in servers
    ]
    batches = [
        Measurement(
            entrant,
            {"connections": BATCH_CONNECTIONS, "tasks_per_request": BATCH},
            partial(measure, run, entrant, BATCH_CONNECTIONS, BATCH),
        )
        for entrant in servers
        if entrant.is_ours
    ]
    return singles + batches


def measure(run: Run, entrant: Entrant, connections: int, tasks: int) -> dict[str, Any]:
    """
    Measure rate and response times, and the CPU that each kind of process spent per task.
    """
    run.prepare(entrant)
    port = free_port()
    url = f"http://127.0.0.1:{port}/tasks"
    body = json.dumps(TASK).encode()
    table = "tasks"
    settings = run.environment(entrant)
    if entrant.is_ours:
        _publish_handlers(run, entrant)
        settings |= {**environment(), "ASYNCFLOW_API_PORT": str(port)}
        table = "asyncflow.tasks"
    if tasks > 1:
        url, body = f"{url}/batch", json.dumps({"tasks": [TASK] * tasks}).encode()
    seconds = SECONDS if run.sizes.share >= 1 else SECONDS / 2
    with running([_command(entrant, port)], environment=settings, log=run.log(entrant)) as api:
        wait_until(lambda: _accepts(url, body), seconds=30, poll_seconds=0.05)
        post_for(WARM_UP_SECONDS, url, body, connections=connections)
        rows = count_rows(f"SELECT count(*) FROM {table}")
        before = run.services.cpu_seconds() | {"API": api.cpu_seconds()}
        with profile(run, f"http-{entrant.key}-{connections}-{tasks}", api.pids):
            answers = post_for(seconds, url, body, connections=connections)
        after = run.services.cpu_seconds() | {"API": api.cpu_seconds()}
        rows = count_rows(f"SELECT count(*) FROM {table}") - rows
    return {
        "per_second": round(answers.per_second * tasks, 1),
        "p50_ms": answers.p50_ms,
        "p99_ms": answers.p99_ms,
        "refused": answers.refused,
        "rows": rows,
        "generator": answers.generator,
        "cpu_us_per_task": {k: round((after[k] - before[k]) / rows * 1e6, 1) for k in after},
    }


def _command(entrant: Entrant, port: int) -> Sequence[str]:
    if entrant.is_ours:
        return [program("asyncflow"), "api"]
    return [sys.executable, "-m", "uvicorn", "bench.systems.naive:app", "--port", str(port)] + [
        "--loop",
        "uvloop",
        "--http",
        "httptools",
        "--no-access-log",
        "--log-level",
        "warning",
    ]


def _publish_handlers(run: Run, entrant: Entrant) -> None:
    commands = load_system(entrant.system).worker_commands(1, "")[:1]
    with running(commands, environment=run.environment(entrant), log=run.log(entrant)):
        wait_until(
            lambda: count_rows("SELECT count(*) FROM asyncflow.publications") > 1,
            seconds=30,
            poll_seconds=0.05,
        )
        time.sleep(0.2)


def _accepts(url: str, body: bytes) -> bool:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 202)
    except ConnectionError:
        return False
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError):
            return False
        raise
