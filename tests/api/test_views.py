"""
Hand-written JSON equals what the model would serialise.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from asyncflow.api.views import submitted_json
from asyncflow.domain.task import NewTask
from asyncflow.store.submit import Submitted
from asyncflow.wire.submissions import SubmittedTask

CREATED_AT = datetime(2030, 1, 31, 9, 30, 0, 4_210, UTC)
LATER = CREATED_AT + timedelta(days=1, microseconds=-4_210)


@pytest.mark.parametrize(
    ("submitted", "changes"),
    [
        (Submitted("PENDING", CREATED_AT, CREATED_AT), {}),
        (Submitted("SCHEDULED", CREATED_AT, LATER), {"priority": 0}),
        (Submitted("PENDING", CREATED_AT, CREATED_AT), {"expires_at": LATER}),
    ],
    ids=["due", "later", "expires"],
)
def test_a_submitted_task_reads_as_its_model_writes_it(
    submitted: Submitted, changes: dict[str, Any]
) -> None:
    """
    Both encodings of a submitted task are equal, byte for byte.
    """
    task = NewTask(
        id=UUID("0192f0c1-2b3c-7d4e-8f50-123456789abc"),
        tenant_id=1,
        name="invoices.render-2_b",
        queue="slow",
        priority=4,
        payload="{}",
    )._replace(**changes)

    model = SubmittedTask.model_construct(
        id=task.id,
        name=task.name,
        status=submitted.status,
        queue=task.queue,
        priority=task.priority,
        created_at=submitted.created_at,
        run_at=submitted.run_at,
        expires_at=task.expires_at,
    )
    assert model.model_dump_json() == submitted_json(task, submitted)
