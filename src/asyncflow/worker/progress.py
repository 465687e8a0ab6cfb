"""
What handlers report about their progress, on its way to PostgreSQL.
"""

from __future__ import annotations

import contextlib
import json
from uuid import UUID

from asyncflow.domain.task import Claim
from asyncflow.errors import StoreError
from asyncflow.handlers import Progress
from asyncflow.store import claims
from asyncflow.store.database import Database


class ProgressReports:
    """
    Keeps the latest report of each attempt until it is written.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._latest: dict[tuple[UUID, UUID], Progress] = {}

    def note(self, claim: Claim, progress: Progress) -> None:
        """
        Keep a report, in place of an earlier one of this attempt. From any thread.
        """
        # Adding to a dictionary and taking from it are atomic.
        self._latest[claim.task_id, claim.lease_id] = progress

    async def flush(self) -> None:
        """
        Write what was reported since the last time.
        """
        rows = []
        while self._latest:
            (task_id, lease_id), latest = self._latest.popitem()
            text = json.dumps({"fraction": latest.fraction, "message": latest.message})
            rows.append((task_id, lease_id, text))
        if rows:
            # Progress is news, not truth: if it cannot be written now, the next report can.
            with contextlib.suppress(StoreError):
                await claims.record_progress(self._db, rows)
