"""
Every hot statement finds its rows by an index, whatever the tables held when it was planned.

Tables of tasks swing between empty and millions of rows. PostgreSQL plans a statement once
per connection and keeps the plan; one made for an empty table must serve a full one.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from asyncflow.domain.outcome import Settlement
from asyncflow.domain.states import Event
from asyncflow.store import claims, due, hints, read, settle, steer, unserved, upkeep, workers
from asyncflow.store.database import Database
from asyncflow.store.due import measure_marks
from asyncflow.store.settle import Settling
from tests.support.builders import claimed_due, submitted

ROWS = 4_000
PAGES_MAX = 300

BY_ID = r"\(id = "
LIVE_BY_ID = {"tasks_live": ("tasks_live_pkey", BY_ID)}
DUE = ("tasks_due", r"queue = .*priority = .*run_at <=")
DUE_SINCE = ("tasks_due", r"queue = .*priority = .*run_at <=.*run_at >=")
OLDEST = ("tasks_due", r"queue = .*priority = ")
QUEUED = ("tasks_queued", r"queue = ")
DEAD_BY_ID = ("tasks_dead", r"tenant_id = .* AND \(id = ")

EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "CLAIM_DUE": (claims.CLAIM_DUE, {"tasks_live": (DUE, LIVE_BY_ID["tasks_live"])}),
    "CLAIM_DUE_SINCE": (
        claims.CLAIM_DUE_SINCE,
        {"tasks_live": (DUE_SINCE, LIVE_BY_ID["tasks_live"])},
    ),
    "OLDEST_PENDING": (due.OLDEST_PENDING, {"tasks_live": OLDEST}),
    "CLAIM_HINTED": (claims.CLAIM_HINTED, LIVE_BY_ID),
    "SETTLE_COMPLETED": (settle.SETTLE_COMPLETED, LIVE_BY_ID),
    "SETTLE_FAILED": (settle.SETTLE_FAILED, LIVE_BY_ID),
    "SETTLE_CANCELLED": (settle.SETTLE_CANCELLED, LIVE_BY_ID),
    "SETTLE_RETRIED": (settle.SETTLE_RETRIED, LIVE_BY_ID),
    "SETTLE_RELEASED": (settle.SETTLE_RELEASED, LIVE_BY_ID),
    "RECORDS": (
        settle.RECORDS,
        {
            "tasks_finished": ("tasks_finished_pkey", BY_ID),
            "attempts": ("attempts_pkey", r"task_id = "),
        },
    ),
    "RECORD_PROGRESS": (claims.RECORD_PROGRESS, LIVE_BY_ID),
    "OPEN_QUEUES": (hints.OPEN_QUEUES, {"tasks_live": QUEUED}),
    "ADMISSIBLE": (due.ADMISSIBLE, {"tasks_live": DUE}),
    "ADMISSIBLE_SINCE": (due.ADMISSIBLE_SINCE, {"tasks_live": DUE_SINCE}),
    "MARK_QUEUED": (hints.MARK_QUEUED, LIVE_BY_ID),
    "UNQUEUE": (hints.UNQUEUE, LIVE_BY_ID),
    "UNQUEUE_LOST": (
        hints.UNQUEUE_LOST,
        {"tasks_live": (QUEUED, LIVE_BY_ID["tasks_live"])},
    ),
    "UNQUEUE_DROPPED": (hints.UNQUEUE_DROPPED, LIVE_BY_ID),
    "COUNT_UNKNOWN": (
        hints.COUNT_UNKNOWN,
        LIVE_BY_ID | {"tasks_finished": ("tasks_finished_pkey", BY_ID)},
    ),
    "UNSERVED": (
        unserved.UNSERVED,
        # Queue by queue, the first from the beginning; then the oldest of each.
        {"tasks_live": (("tasks_due", r"^$"), ("tasks_due", r"queue > "), DUE)},
    ),
    "LOST_LEASES": (upkeep.LOST_LEASES, {"tasks_live": ("tasks_running", "")}),
    "EXPIRE": (
        upkeep.EXPIRE,
        {"tasks_live": (("tasks_expiring", r"expires_at <="), LIVE_BY_ID["tasks_live"])},
    ),
    "MOVE_TO_HANDLERS_QUEUE": (
        upkeep.MOVE_TO_HANDLERS_QUEUE,
        {"tasks_live": (("tasks_due", r"queue = "), LIVE_BY_ID["tasks_live"])},
    ),
    "PRUNE_FINISHED": (
        upkeep.PRUNE_FINISHED,
        {
            "tasks_finished": (
                ("tasks_finished_at", r"finished_at <"),
                ("tasks_finished_pkey", BY_ID),
            ),
            "attempts": ("attempts_pkey", r"task_id = "),
        },
    ),
    "HELD": (workers.HELD, {"tasks_live": ("tasks_running", r"worker_id = ")}),
    "GET": (
        read.GET,
        LIVE_BY_ID
        | {
            "tasks_finished": ("tasks_finished_pkey", BY_ID),
            "attempts": ("attempts_pkey", r"task_id = "),
        },
    ),
    "CANCEL_WAITING": (steer.CANCEL_WAITING, LIVE_BY_ID),
    "REQUEST_CANCEL": (steer.REQUEST_CANCEL, LIVE_BY_ID),
    "RUN_NOW": (steer.RUN_NOW, LIVE_BY_ID),
    "REDRIVE": (steer.REDRIVE, {"tasks_finished": DEAD_BY_ID}),
}
"""Each statement, and per table the index (or indexes) it may use and how."""

IN_ORDER = {
    "tasks_live": ("tasks_live_pkey", ""),
    "tasks_finished": ("tasks_finished_pkey", ""),
}
DEAD = {"tasks_finished": ("tasks_dead", r"tenant_id = ")}

LISTS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), IN_ORDER),
    (("FAILED",), DEAD),
    (("FAILED", "CANCELLED"), DEAD),
    (("FAILED", "COMPLETED"), {"tasks_finished": IN_ORDER["tasks_finished"]}),
    (("SCHEDULED", "RETRYING"), {"tasks_live": IN_ORDER["tasks_live"]}),
    (("PENDING", "QUEUED", "RUNNING"), {"tasks_live": IN_ORDER["tasks_live"]}),
    (("RUNNING", "FAILED"), IN_ORDER),
    (tuple(read.STATUS_FILTERS), IN_ORDER),
]
"""Statuses that a list filters by, and the only tables it reads, each by an index."""

FILL = """
    INSERT INTO asyncflow.tasks
           (id, tenant_id, name, queue, priority, state, run_at, payload, attempt,
            worker_id, lease_id, queued_at, started_at, expires_at, finished_at)
    SELECT gen_random_uuid(), 1, 'greet', 'default', n % 10, state,
           now() + (CASE WHEN state = 'pending' THEN 3600 ELSE 0 END) * interval '1 second',
           '{}', 1,
           CASE WHEN state = 'running' THEN gen_random_uuid() END,
           CASE WHEN state IN ('running', 'failed') THEN gen_random_uuid() END,
           CASE WHEN state = 'queued' THEN now() END, now(),
           CASE WHEN n % 2 = 0 THEN now() + interval '1 day' END,
           CASE WHEN state IN ('completed', 'failed') THEN now() END
      FROM generate_series(1, $1::int) AS n,
           unnest('{pending,queued,running,completed,failed}'::text[]) AS state
"""


@pytest.fixture(params=["empty", "filled", "analyzed", "emptied"])
async def planner(
    request: pytest.FixtureRequest, connection: asyncpg.Connection
) -> asyncpg.Connection:
    """
    One of the product's connections, on tables with a history.
    """
    if request.param != "empty":
        await connection.fetch(FILL, ROWS)
    if request.param == "analyzed":
        await connection.execute("ANALYZE asyncflow.tasks")
    if request.param == "emptied":
        await connection.execute("DELETE FROM asyncflow.tasks")
        await connection.execute("VACUUM ANALYZE asyncflow.tasks_live, asyncflow.tasks_finished")
    return connection


async def test_every_hot_statement_uses_the_index_made_for_it(planner: asyncpg.Connection) -> None:
    """
    No hot statement scans tasks or attempts sequentially or reads an index from end to end.
    """
    wrong = []
    for name, (statement, indexes) in EXPECTED.items():
        await _prepare(planner, name, statement)
        nulls = ["NULL"] * _parameters(statement)
        (plan,) = await _explain(planner, name, nulls)
        for node in _nodes(plan):
            table = node.get("Relation Name")
            if (
                table in ("tasks_live", "tasks_finished", "attempts")
                and "Scan" in node["Node Type"]
            ):
                if not _is_expected(node, indexes.get(table, ())):
                    wrong.append((name, table, node.get("Index Name"), node.get("Index Cond")))

    assert [] == wrong


@pytest.mark.parametrize(("statuses", "indexes"), LISTS)
async def test_a_list_of_any_statuses_is_read_in_order(
    planner: asyncpg.Connection, statuses: tuple[str, ...], indexes: dict[str, Any]
) -> None:
    """
    A list reads only the partitions that can hold its statuses, newest first by an index, without a
    sort.
    """
    statement = read.LIST.format(filters=read.status_filter(statuses))
    await _prepare(planner, "LIST", statement)

    (plan,) = await _explain(planner, "LIST", ["1", "50"])

    nodes = list(_nodes(plan))
    scans = {node["Relation Name"]: node for node in nodes if "Relation Name" in node}
    assert set(indexes) == set(scans)
    assert not [node for node in nodes if "Sort" in node["Node Type"]]
    for table, node in scans.items():
        assert _is_expected(node, indexes[table])


async def test_a_plan_made_while_the_tables_were_empty_serves_full_ones(
    fresh_db: Database, connection: asyncpg.Connection
) -> None:
    """
    With a plan made for empty tables, a statement about one task still reads a handful of rows
    among thousands.
    """
    ids = {state: uuid4() for state in ("pending", "queued", "running", "completed", "failed")}
    lease, worker, other = uuid4(), uuid4(), uuid4()

    def array(*values: object) -> str:
        return "'{" + ",".join(map(str, values)) + "}'"

    def one(value: object) -> str:
        return f"'{value}'"

    offers = [one(other), one(worker), array("greet"), array(5), array(900)]
    waiting = array(ids["pending"], ids["queued"])
    settling = [array(ids["running"]), array(lease), array("null")]
    arguments = {
        "CLAIM_HINTED": [*offers, waiting],
        "SETTLE_COMPLETED": settling,
        "SETTLE_FAILED": settling,
        "SETTLE_CANCELLED": settling,
        "SETTLE_RETRIED": [*settling, array(0)],
        "SETTLE_RELEASED": settling,
        "RECORDS": [array(ids["completed"]), array(lease)],
        "RECORD_PROGRESS": settling,
        "MARK_QUEUED": [waiting, array(0, 0)],
        "UNQUEUE": [waiting, "0", array("other")],
        "HELD": [one(worker), "0"],
        "GET": ["1", one(ids["completed"]), "true"],
        "UNQUEUE_DROPPED": [waiting],
        "COUNT_UNKNOWN": [waiting],
        "CANCEL_WAITING": ["1", one(ids["pending"])],
        "REQUEST_CANCEL": ["1", one(ids["running"])],
        "RUN_NOW": ["1", one(ids["pending"])],
        "REDRIVE": ["1", one(ids["failed"])],
        "CLAIM_DUE": [*offers, array("default", "other"), "1"],
        "ADMISSIBLE": [one("default"), array("greet"), "1"],
        "EXPIRE": ["10"],
        "PRUNE_FINISHED": ["1", "10"],
    }
    for name in arguments:
        await _prepare(connection, name, EXPECTED[name][0])
        # This plans the statement; on an empty table it changes nothing.
        await connection.execute(f"EXECUTE {name.lower()}({', '.join(arguments[name])})")
    await fresh_db.fetch(FILL, ROWS)
    for state, task_id in ids.items():
        await _make_known(fresh_db, state, task_id, lease=lease, worker=worker)

    read = {}
    for name, values in arguments.items():
        async with _undone(connection):
            (plan,) = await _explain(connection, name, values, options="ANALYZE, BUFFERS, ")
        read[name] = plan["Shared Hit Blocks"]

    # Each statement reads four rows at most; a scan would read thousands.
    assert {} == {name: pages for name, pages in read.items() if pages > PAGES_MAX}


async def test_tasks_that_are_not_due_are_not_stepped_over(
    fresh_db: Database, connection: asyncpg.Connection
) -> None:
    """
    However many tasks wait for a later time, a claim reads only those it takes.
    """
    await fresh_db.fetch(FILL, ROWS)
    await fresh_db.execute(
        "UPDATE asyncflow.tasks SET run_at = now() WHERE id IN"
        " (SELECT id FROM asyncflow.tasks WHERE state = 'pending' LIMIT 5)"
    )
    await _prepare(connection, "CLAIM_DUE", claims.CLAIM_DUE)
    values = [f"'{uuid4()}'", f"'{uuid4()}'", "'{greet}'", "'{5}'", "'{900}'", "'{default}'", "100"]

    async with _undone(connection):
        (plan,) = await _explain(connection, "CLAIM_DUE", values, options="ANALYZE, BUFFERS, ")

    (scan,) = [node for node in _nodes(plan) if node.get("Index Name") == "tasks_due"]
    assert 0 == scan.get("Rows Removed by Filter", 0)
    assert scan["Shared Hit Blocks"] < PAGES_MAX
    assert 5 == len(await claimed_due(fresh_db, 100))


async def test_what_cannot_be_removed_is_not_stepped_over_by_every_claim(
    fresh_db: Database, connection: asyncpg.Connection
) -> None:
    """
    After thousands of tasks have run while a transaction stays open, a claim from the beginning
    reads all of their index entries; one from the low-water mark reads next to none.
    """
    others = await fresh_db.connect("others")
    async with others.transaction(isolation="repeatable_read"):
        await others.fetchval("SELECT count(*) FROM asyncflow.tasks")
        await _run_tasks(fresh_db, 6_000, run_at=datetime.now(UTC) - timedelta(hours=1))
        (task_id,) = await submitted(fresh_db, 1)
        since = (await measure_marks(fresh_db, queues=["default"], names=["greet"])).marks
        moments = ", ".join(f"'{moment}'" for moment in since["default"])
        values = [f"'{uuid4()}'", f"'{uuid4()}'", "'{greet}'", "'{5}'", "'{900}'", "'{default}'"]
        read = {}
        since_each = f"ARRAY[{moments}]::timestamptz[]"
        for statement, more in (("CLAIM_DUE", []), ("CLAIM_DUE_SINCE", [since_each])):
            await _prepare(connection, statement, EXPECTED[statement][0])
            async with _undone(connection):
                (plan,) = await _explain(
                    connection, statement, [*values, "1", *more], options="ANALYZE, BUFFERS, "
                )
            (scan,) = [node for node in _nodes(plan) if node.get("Index Name") == "tasks_due"]
            read[statement] = scan["Shared Hit Blocks"]
        claimed = await claimed_due(fresh_db, since=since)
    await others.close()

    assert 3 * read["CLAIM_DUE_SINCE"] < read["CLAIM_DUE"]
    assert [task_id] == [claim.task_id for claim in claimed]


async def _run_tasks(db: Database, count: int, **changes: Any) -> None:
    batch = 500
    for _ in range(count // batch):
        await submitted(db, batch, **changes)
        taken = await claimed_due(db, batch)
        done = Settlement(Event.COMPLETE, result="null")
        await settle.settle(db, [Settling(c.task_id, c.lease_id, done) for c in taken])


@asynccontextmanager
async def _undone(connection: asyncpg.Connection) -> AsyncIterator[None]:
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        await transaction.rollback()


async def _prepare(connection: asyncpg.Connection, name: str, statement: str) -> None:
    await connection.execute(f"PREPARE {name.lower()} AS {statement}")


def _parameters(statement: str) -> int:
    return len(set(re.findall(r"\$\d+", statement)))


async def _explain(
    connection: asyncpg.Connection, name: str, values: list[str], *, options: str = ""
) -> list[dict[str, Any]]:
    call = f"{name.lower()}({', '.join(values)})" if values else name.lower()
    text = await connection.fetchval(f"EXPLAIN ({options}FORMAT JSON) EXECUTE {call}")
    return [entry["Plan"] for entry in json.loads(text)]


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


def _is_expected(node: dict[str, Any], allowed: Any) -> bool:
    if allowed and isinstance(allowed[0], str):
        allowed = (allowed,)
    return any(
        node.get("Index Name") == index and re.search(condition, node.get("Index Cond", ""))
        for index, condition in allowed
    )


async def _make_known(
    db: Database, state: str, task_id: UUID, *, lease: UUID, worker: UUID
) -> None:
    await db.execute(
        "UPDATE asyncflow.tasks SET id = $2, run_at = now(),"
        " lease_id = CASE WHEN state = 'running' THEN $3::uuid ELSE lease_id END,"
        " worker_id = CASE WHEN state = 'running' THEN $4::uuid END"
        " WHERE id = (SELECT id FROM asyncflow.tasks WHERE state = $1 LIMIT 1)",
        state,
        task_id,
        lease,
        worker,
    )
