"""
What a worker and its child processes say to each other, and how it is written.

Four bytes of length, big-endian, then JSON; nothing is ever unpickled. `number` counts the
attempts of one child, so that a request to stop one cannot hit the next.

    parent → child    {"do": "prepare", "path": [...], "logs": {…}}         once
                      {"do": "run", "number": 7, "handler": …, "payload": …, "context": {…}}
                      {"do": "stop", "number": 7}
    child → parent    {"tell": "started", "number": 7}
                      {"tell": "progress", "number": 7, "fraction": 0.5, "message": null}
                      {"tell": "ended", "number": 7, "outcome": {…}, "stop_seen": false}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from asyncflow.domain.outcome import Completed, Failed, Failure, Outcome
from asyncflow.handlers.context import Context

Message = dict[str, Any]


def write(message: Message) -> bytes:
    """
    One message as bytes.
    """
    data = json.dumps(message).encode()
    return len(data).to_bytes(4, "big") + data


class Reader:
    """
    Cuts a stream of bytes into messages.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """
        The messages that `data` completes.
        """
        self._buffer += data
        while len(self._buffer) >= 4:
            end = 4 + int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) < end:
                return
            message = json.loads(self._buffer[4:end])
            del self._buffer[:end]
            yield message


def write_outcome(outcome: Outcome) -> Message:
    """
    What a call came to; calls only ever complete or fail.
    """
    if isinstance(outcome, Completed):
        return {"result": outcome.result}
    assert isinstance(outcome, Failed)
    failure = outcome.failure
    return {
        "failure": [failure.kind, failure.message, failure.traceback],
        "retryable": outcome.retryable,
        "after_seconds": outcome.after_seconds,
    }


def read_outcome(written: Message) -> Outcome:
    """
    The outcome that `write_outcome` wrote.
    """
    if "result" in written:
        return Completed(written["result"])
    return Failed(Failure(*written["failure"]), written["retryable"], written["after_seconds"])


def write_context(context: Context) -> Message:
    """
    A context's fields; its time is sent as what is left of it.
    """
    return {
        "task_id": str(context.task_id),
        "name": context.name,
        "queue": context.queue,
        "attempt": context.attempt,
        "max_attempts": context.max_attempts,
        "lease_id": str(context.lease_id),
        "tenant_id": context.tenant_id,
        "timeout_seconds": context.remaining_seconds(),
    }


def read_context(written: Message) -> dict[str, Any]:
    """
    The arguments for a `Context` like the one that `write_context` wrote.
    """
    ids = {key: UUID(written[key]) for key in ("task_id", "lease_id")}
    return {**written, **ids}
