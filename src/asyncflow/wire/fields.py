"""
The fields that every resource shares: names, statuses and times.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from asyncflow.domain.policy import NAME_PATTERN

Status = Literal[
    "PENDING", "SCHEDULED", "RETRYING", "QUEUED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"
]
"""A task's state as users see it; see `domain.states`."""

STATUSES: tuple[str, ...] = get_args(Status)

_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:\d\d)", re.ASCII
)
_FIRST = datetime.min.replace(tzinfo=UTC) + timedelta(microseconds=1)
_LAST = datetime.max.replace(tzinfo=UTC) - timedelta(microseconds=1)


def rfc3339(time: datetime) -> str:
    """
    `time` in UTC with microseconds, ending in `Z`.
    """
    return time.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def _instant(value: object) -> datetime:
    try:
        if isinstance(value, str) and _RFC_3339.fullmatch(value):
            value = datetime.fromisoformat(value.upper())
        if isinstance(value, datetime) and value.tzinfo is not None:
            # Some languages say "never" with the first or last moment of the calendar. Those
            # would reach PostgreSQL as infinities and come back without a time zone.
            return min(max(value.astimezone(UTC), _FIRST), _LAST)
    except (ValueError, OverflowError):
        # The 30th of February, or a time that leaves the calendar on its way to UTC.
        pass
    raise ValueError(
        "must be an RFC 3339 time with its offset, such as 2030-01-31T09:30:00Z "
        "or 2030-01-31T10:30:00+01:00"
    )


Name = Annotated[
    str,
    Field(
        pattern=f"^{NAME_PATTERN.pattern}$",
        description="1-128 characters from [A-Za-z0-9._-]",
        examples=["sample-task"],
    ),
]
Instant = Annotated[
    datetime,
    BeforeValidator(_instant),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
Timestamp = Annotated[
    datetime,
    PlainSerializer(rfc3339, return_type=str, when_used="json"),
    WithJsonSchema(
        {"type": "string", "format": "date-time", "examples": ["2030-01-31T09:30:00.000000Z"]}
    ),
]
