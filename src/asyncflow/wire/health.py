"""
What the probes answer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Live(BaseModel):
    """
    The process is alive.
    """

    status: Literal["live"] = "live"


class Ready(BaseModel):
    """
    The process can accept tasks.
    """

    status: Literal["ready", "degraded"] = Field(
        description="`degraded`: tasks are accepted, but something prevents them from running."
    )
    schema_version: str
    broker: str = Field(
        description="The state of RabbitMQ as the relay last reported it: `up`, or `unusable: ` "
        "with the reason; `unknown: …` without a maintenance process; or `not used`. Tasks are "
        "accepted in any state."
    )
    maintenance: str = Field(
        description="`running`, or how long ago a maintenance process was last seen. Tasks are "
        "accepted in any state."
    )
