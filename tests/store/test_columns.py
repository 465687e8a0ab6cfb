"""
The cost of a new column of `tasks`: columns are declared once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import asyncflow
from asyncflow.domain.task import Claim, NewTask, Task
from asyncflow.store import columns
from asyncflow.store.schema import SCHEMA_VERSION

SOURCE = Path(asyncflow.__file__).parent

MIGRATION = f'''
from alembic import op

revision = "9999"
down_revision = "{SCHEMA_VERSION}"
compatible_from = "{SCHEMA_VERSION}"


def upgrade() -> None:
    op.execute("ALTER TABLE asyncflow.tasks ADD COLUMN color text")
'''

NEW_LINES = {
    "domain/task.py": [
        ("    run_at: datetime | None = None\n", "    color: str | None = None\n"),
        ("    failures: int\n    max_attempts: int | None\n", "    color: str | None\n"),
        ("    failures: int\n    max_attempts: int\n", "    color: str | None\n"),
    ],
    "wire/submissions.py": [
        ("    priority: int = Field(\n", "    color: str | None = None\n"),
    ],
    "wire/tasks.py": [
        ("    generation: int = Field(", "    color: str | None\n"),
    ],
}
"""The lines that a nullable column needs besides its migration, each with its neighbour."""

JOURNEY = """
import asyncio, json, sys
from uuid import uuid4

import httpx

from asyncflow.api.app import create_app
from asyncflow.api.catalogue import Catalogue
from asyncflow.api.examples import TASK_SUMMARY
from asyncflow.cli.views import _facts
from asyncflow.settings import Settings
from asyncflow.store import claims, read
from asyncflow.store.claims import Offer
from asyncflow.store.database import Database
from asyncflow.store.migrations import migrate
from asyncflow.store.wakeups import Waker


async def journey(url):
    await migrate(url)
    async with Database(url) as db:
        waker = Waker(db)
        app = create_app(
            db,
            Settings(api_hosts=("api",)),
            catalogue=Catalogue(db),
            waker=waker,
            version="1",
        )
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            answer = await client.post("/tasks", json={"name": "paint", "color": "red"})
            assert answer.status_code == 202, answer.text
            task_id = answer.json()["id"]
            got = (await client.get(f"/tasks/{task_id}")).json()
            listed = (await client.get("/tasks")).json()["tasks"][0]
        [task] = (await read.list_tasks(db, 1)).tasks
        [claim] = await claims.claim_due(
            db,
            lease_id=uuid4(),
            worker_id=uuid4(),
            offers=[Offer("paint", 5, 900.0)],
            queues=["default"],
            limit=1,
        )
        await waker.close()
    return {
        "got": got["color"],
        "listed": listed["color"],
        "claimed": claim.color,
        "at the terminal": dict(_facts(task))["color"],
        "is in the example": "color" in TASK_SUMMARY,
    }


print(json.dumps(asyncio.run(journey(sys.argv[1]))))
"""


def test_a_nullable_column_is_added_in_four_places(database_url: str, tmp_path: Path) -> None:
    """
    With these lines alone, the column is submitted over HTTP, stored, shown, listed, described and
    claimed.
    """
    copy = tmp_path / "asyncflow"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "store/migrations/versions/9999_color.py").write_text(MIGRATION)
    for file, lines in NEW_LINES.items():
        text = (copy / file).read_text()
        for neighbour, line in lines:
            assert 1 == text.count(neighbour), (file, neighbour)
            text = text.replace(neighbour, f"{line}{neighbour}")
        (copy / file).write_text(text)

    ended = subprocess.run(
        [sys.executable, "-c", JOURNEY, database_url],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert 4 >= 1 + len(NEW_LINES)
    assert "" == ended.stderr
    assert {
        "got": "red",
        "listed": "red",
        "claimed": "red",
        "at the terminal": "red",
        "is in the example": True,
    } == json.loads(ended.stdout)


def test_every_declared_field_is_a_column_or_computed() -> None:
    """
    The SQL of a task covers every field of its three shapes.
    """
    assert [p.name for p in columns.SUBMITTED] == [*NewTask._fields]
    assert {*columns.LISTED, *columns.DETAILED} | {"status", "waiting_for", "attempts"} == set(
        Task.__dataclass_fields__
    )
    assert ("payload", "result") == columns.DETAILED
    assert len(Claim._fields) == len(columns.CLAIMED)
