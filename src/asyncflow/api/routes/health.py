"""
Health: `live` says that the process answers, `ready` that it can accept tasks.

Ready requires a real write, a schema that serves this version, and every privilege that a
submission needs. RabbitMQ is reported but never makes the API unready: tasks are accepted
without it.
"""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from asyncflow.api.dependencies import TheParts
from asyncflow.api.openapi import operation_id, problems
from asyncflow.errors import StoreUnavailable
from asyncflow.store.database import Executor
from asyncflow.store.presence import Presence, presence
from asyncflow.store.schema import Schema, check_schema
from asyncflow.store.submit import submit_nothing
from asyncflow.store.upkeep import probe
from asyncflow.wire.health import Live, Ready

PROBE_SECONDS_MAX = 3.0
"""A slower probe counts as failed."""


router = APIRouter(tags=["health"], generate_unique_id_function=operation_id)


@router.get(
    "/health/live",
    summary="Liveness probe",
    response_model=Live,
    response_description="The process is alive.",
    responses=problems(),
)
async def live() -> Response:
    """
    Answers without checking anything else: restart the process if it does not answer.
    """
    return _json(Live())


@router.get(
    "/health/ready",
    summary="Readiness probe",
    response_model=Ready,
    response_description="The process can accept tasks.",
    responses=problems("unavailable", "schema-mismatch"),
)
async def ready(parts: TheParts) -> Response:
    """
    Writes to the database, and checks its schema and whether it would store a task: send no
    requests here while it fails. It is `degraded` if tasks are accepted but something prevents
    them from running.
    """
    schema, maintenance = await _check(parts.db)
    return _json(_ready(schema, maintenance, through_relay=parts.through_relay))


def _ready(schema: Schema, maintenance: Presence, *, through_relay: bool) -> Ready:
    is_well = not maintenance.is_gone and maintenance.relay_trouble is None
    return Ready(
        status="ready" if is_well else "degraded",
        schema_version=schema.version,
        broker=_broker(maintenance) if through_relay else "not used",
        maintenance=_maintenance(maintenance),
    )


def _broker(maintenance: Presence) -> str:
    # A connection of this process would not tell whether the relay can use its own.
    if maintenance.is_gone:
        return "unknown: no maintenance process reports on it"
    trouble = maintenance.relay_trouble
    return "up" if trouble is None else f"unusable: {trouble}"


def _maintenance(maintenance: Presence) -> str:
    if not maintenance.is_gone:
        return "running"
    seconds = maintenance.silent_seconds
    seen = "never seen" if seconds is None else f"last seen {seconds:.0f} seconds ago"
    return f"not running, {seen}: tasks of dead workers wait"


async def _check(db: Executor) -> tuple[Schema, Presence]:
    try:
        async with asyncio.timeout(PROBE_SECONDS_MAX):
            schema = await check_schema(db)
            await probe(db)
            await submit_nothing(db)
            return schema, await presence(db)
    except TimeoutError:
        raise StoreUnavailable(
            f"The database did not take a write within {PROBE_SECONDS_MAX:g} seconds."
        ) from None


def _json(view: Live | Ready) -> Response:
    return Response(view.model_dump_json(), media_type="application/json")
