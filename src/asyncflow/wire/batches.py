"""
Tasks submitted together, and the answer for each.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from asyncflow.wire.problems import Problem
from asyncflow.wire.submissions import SubmitTask, SubmittedTask

BATCH_SIZE_MAX = 1_000


class SubmitBatch(BaseModel):
    """
    Tasks to submit together: either all of them are stored or none, unless `partial` is set.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    tasks: list[SubmitTask] = Field(min_length=1, max_length=BATCH_SIZE_MAX)
    partial: bool = Field(
        default=False,
        description="Store the valid tasks, in one transaction, and report the others. Otherwise "
        "one invalid task refuses the whole batch.",
    )


class RefusedTask(BaseModel):
    """
    A task of a `partial` batch that was not stored.
    """

    index: int = Field(description="Position in the batch, starting at 0.")
    problem: Problem


class SubmittedBatch(BaseModel):
    """
    The stored tasks of a batch.
    """

    tasks: list[SubmittedTask | None] = Field(
        description="In the order submitted. Null stands for a refused task, which occurs only "
        "in a `partial` batch."
    )
    refused: list[RefusedTask] = Field(description="The refused tasks, in the order submitted.")
