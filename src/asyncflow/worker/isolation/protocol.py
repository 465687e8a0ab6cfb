"""
What a worker, its nursery and its child processes say to each other, and how it is written.

Four bytes of length, big-endian, then JSON; nothing is ever unpickled. `number` counts the
attempts of one child, so that a request to stop one cannot hit the next.

    worker → child    {"do": "run", "number": 7, "handler": …, "payload": …, "claim": {…}}
                      {"do": "stop", "number": 7}
    child → worker    {"tell": "ready"}                                       once
                      {"tell": "started", "number": 7}
                      {"tell": "progress", "number": 7, "fraction": 0.5, "message": null}
                      {"tell": "ended", "number": 7, "outcome": {…}, "stop_seen": false}

A nursery is told first what to load, and so is a child that could not be forked. To a nursery,
`number` is that of a child; with `start` comes the child's end of a socket pair.

    worker → both     {"do": "load", "path": […], "modules": […], "handlers": […], "logs": {…},
                       "files": {…}}                                          once
    both → worker     {"tell": "loading", "module": "billing.tasks"}
                      {"tell": "refused", "reason": …}
    worker → nursery  {"do": "start", "number": 3}
                      {"do": "kill", "number": 3}
    nursery → worker  {"tell": "loaded", "forks": true, "files": {…}}         once
                      {"tell": "started", "number": 3, "pid": 4711}
                      {"tell": "not_started", "number": 3, "reason": …}
                      {"tell": "died", "number": 3, "status": -9}
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from uuid import UUID

from asyncflow.domain.outcome import Completed, Failed, Failure, Outcome
from asyncflow.domain.task import Claim
from asyncflow.handlers.context import Context

Message = dict[str, Any]


def write(message: Message) -> bytes:
    """
    One message as bytes.
    """
    data = json.dumps(message).encode()
    return len(data).to_bytes(4, "big") + data


def receive_one(connection: socket.socket) -> Message | None:
    """
    Wait for one message; None if the connection ends before.
    """
    head = connection.recv(4, socket.MSG_WAITALL)
    data = connection.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL) if head else b""
    if not data:
        return None
    message: Message = json.loads(data)
    return message


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
    The outcome of a call, which only ever completes or fails.
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


def write_claim(context: Context) -> Message:
    """
    The claim that `context` holds, with what is left of its time; the payload goes by itself.
    """
    claim = context.claim
    return {
        **claim._asdict(),
        "payload": "",
        "task_id": str(claim.task_id),
        "lease_id": str(claim.lease_id),
        "timeout_seconds": context.remaining_seconds(),
        "claimed_at": claim.claimed_at.isoformat(),
    }


def read_claim(written: Message) -> Claim:
    """
    The claim that `write_claim` wrote.
    """
    ids = {key: UUID(written[key]) for key in ("task_id", "lease_id")}
    claimed_at = datetime.fromisoformat(written["claimed_at"])
    return Claim(**{**written, **ids, "claimed_at": claimed_at})
