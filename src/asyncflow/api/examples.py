"""
Example answers for the description of the API.
"""

from __future__ import annotations

from typing import Any

from asyncflow.store.schema import SCHEMA_VERSION
from asyncflow.wire.tasks import TaskSummary

_ID = "0192f0c1-2b3c-7d4e-8f50-123456789abc"
_WORKER_ID = "3f1c9a52-6c1e-4b0e-9a55-0d2f6f1f7a10"
_SUBMITTED_AT = "2030-01-31T09:30:00.000000Z"
_STARTED_AT = "2030-01-31T09:30:00.004210Z"
_FINISHED_AT = "2030-01-31T09:30:05.011873Z"

SUBMITTED_TASK: dict[str, Any] = {
    "id": _ID,
    "name": "sample-task",
    "status": "PENDING",
    "queue": "default",
    "priority": 4,
    "created_at": _SUBMITTED_AT,
    "run_at": _SUBMITTED_AT,
    "expires_at": None,
}

TASK_SUMMARY: dict[str, Any] = {
    **dict.fromkeys(TaskSummary.model_fields),
    "id": _ID,
    "name": "sample-task",
    "status": "COMPLETED",
    "queue": "default",
    "priority": 4,
    "generation": 1,
    "attempt": 1,
    "failures": 0,
    "created_at": _SUBMITTED_AT,
    "run_at": _SUBMITTED_AT,
    "started_at": _STARTED_AT,
    "finished_at": _FINISHED_AT,
    "worker_id": _WORKER_ID,
    "progress": {"fraction": 1.0, "message": None},
    "timings": {"wait_seconds": 0.00421, "run_seconds": 5.007663, "total_seconds": 5.011873},
}

TASK_VIEW: dict[str, Any] = {
    **TASK_SUMMARY,
    "waiting_for": None,
    "attempts": [
        {
            "attempt": 1,
            "generation": 1,
            "outcome": "COMPLETED",
            "started_at": _STARTED_AT,
            "finished_at": _FINISHED_AT,
            "duration_seconds": 5.007663,
            "worker_id": _WORKER_ID,
            "error": None,
        }
    ],
    "payload": {"seconds": 5},
    "result": {"message": "Processed for 5 seconds.", "seconds": 5},
}

PROBLEM: dict[str, Any] = {
    "type": "/problems/invalid-task",
    "title": "Invalid task",
    "status": 422,
    "detail": "/priority must be at most 9.",
    "instance": "/tasks",
    "errors": [{"pointer": "/priority", "detail": "must be at most 9"}],
}

BATCH_PROBLEM: dict[str, Any] = {
    **PROBLEM,
    "detail": "/tasks/1/priority must be at most 9.",
    "instance": "/tasks/batch",
    "errors": [{"pointer": "/tasks/1/priority", "detail": "must be at most 9"}],
}

EXAMPLES = {
    "SubmittedTask": SUBMITTED_TASK,
    "SubmittedBatch": {
        "tasks": [SUBMITTED_TASK, None],
        "refused": [{"index": 1, "problem": BATCH_PROBLEM}],
    },
    "TaskSummary": TASK_SUMMARY,
    "TaskView": TASK_VIEW,
    "TaskPage": {"tasks": [TASK_SUMMARY], "next_cursor": None},
    "Ready": {
        "status": "ready",
        "schema_version": SCHEMA_VERSION,
        "broker": "up",
        "maintenance": "running",
    },
    "Problem": PROBLEM,
}
"""One answer for each model of `wire` that the API returns, by the model's name."""
