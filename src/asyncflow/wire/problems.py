"""
Why a request was refused.
"""

from __future__ import annotations

from pydantic import BaseModel, Field


class ProblemError(BaseModel):
    """
    One error in a request, in its body or its query parameters.
    """

    pointer: str | None = Field(
        default=None, description="JSON pointer (RFC 6901) into the body; '' means the whole body."
    )
    parameter: str | None = Field(default=None, description="The name of the query parameter.")
    detail: str = Field(description="What is wrong, and what would be accepted.")


class Problem(BaseModel):
    """
    Why a request was refused (RFC 9457).
    """

    type: str = Field(examples=["/problems/invalid-task"])
    title: str
    status: int
    detail: str
    instance: str | None = Field(
        default=None,
        description="The request's path; absent if the request could not be read.",
    )
    errors: list[ProblemError] | None = Field(
        default=None, description="The errors, or the first of many."
    )
    state: str | None = Field(default=None, description="The task's status (409 only).")
    incident_id: str | None = Field(
        default=None, description="The incident's id in the server log (500 only)."
    )
