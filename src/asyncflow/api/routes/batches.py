"""
`POST /tasks/batch`: tasks submitted together.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from asyncflow.api.batch import Refused, read_batch, together
from asyncflow.api.body import read_json_body
from asyncflow.api.dependencies import TenantId, TheParts
from asyncflow.api.openapi import SUBMISSION_PROBLEMS, operation_id, problems, takes
from asyncflow.api.problems import as_json, invalid_document
from asyncflow.api.submissions import Submissions
from asyncflow.api.views import submitted_json
from asyncflow.domain.task import NewTask
from asyncflow.errors import InvalidPayload, InvalidTask
from asyncflow.wire.batches import SubmitBatch, SubmittedBatch
from asyncflow.wire.submissions import SubmitTask

router = APIRouter(tags=["tasks"], generate_unique_id_function=operation_id)


@router.post(
    "/tasks/batch",
    summary="Submit a batch",
    status_code=202,
    response_model=SubmittedBatch,
    response_description="Stored.",
    responses={
        207: {
            "model": SubmittedBatch,
            "description": "Some tasks, or all, were refused; `refused` lists them.",
        },
        **problems(*SUBMISSION_PROBLEMS),
    },
    openapi_extra=takes(SubmitBatch),
)
async def submit_batch(request: Request, parts: TheParts, tenant_id: TenantId) -> Response:
    """
    Up to 1000 tasks: either all of them are stored or none. With `partial`, the valid ones are
    stored and the answer says what is wrong with the others. Tasks are answered in the order
    submitted.
    """
    wanted, partial = read_batch(await read_json_body(request.scope, request.receive))
    rows = [_checked(row, n, parts.submissions, tenant_id) for n, row in enumerate(wanted)]
    tasks = [row for row in rows if isinstance(row, NewTask)]
    refusals = {n: row for n, row in enumerate(rows) if not isinstance(row, NewTask)}
    if refusals and not partial:
        raise together(list(refusals.values()))
    stored = map(submitted_json, tasks, await parts.submissions.submit_all(tasks))
    views = ["null" if n in refusals else next(stored) for n in range(len(rows))]
    path = request.scope["path"]
    refused = [{"index": n, "problem": invalid_document(e, path)} for n, e in refusals.items()]
    return Response(
        b'{"tasks":[%b],"refused":%b}' % (",".join(views).encode(), as_json(refused)),
        207 if refused else 202,
        media_type="application/json",
    )


def _checked(
    row: SubmitTask | Refused, number: int, submissions: Submissions, tenant_id: int
) -> NewTask | Refused:
    if not isinstance(row, SubmitTask):
        return row
    try:
        return submissions.new_task(row, tenant_id, f"/tasks/{number}")
    except (InvalidTask, InvalidPayload) as error:
        return error
