"""
Hooks for the Schemathesis run of `test_fuzz`: record every response as one line of JSON.
"""

from __future__ import annotations

import json
import os

import schemathesis

ANSWERS = open(os.environ["ASYNCFLOW_TEST_FUZZ_ANSWERS"], "a", buffering=1)


@schemathesis.hook
def after_call(context, case, response):
    """
    Record the request, the status, and the ids of the tasks that it stored.
    """
    ids = []
    if case.method == "POST" and case.path in ("/tasks", "/tasks/batch"):
        if response.status_code in (202, 207):
            answer = json.loads(response.content)
            ids = [task["id"] for task in answer.get("tasks", [answer]) if task]
    line = {"request": f"{case.method} {case.path}", "status": response.status_code, "ids": ids}
    ANSWERS.write(f"{json.dumps(line)}\n")
