"""
Every error AsyncFlow raises on purpose, as one tree.

    AsyncFlowError
    ├── InvalidInput            a request, argument or setting that cannot be right
    │   ├── InvalidTask         a submitted task, with a pointer to each wrong field
    │   ├── InvalidPayload      a payload its handler cannot take
    │   └── InvalidSettings     the environment or .env
    ├── TaskNotFound
    ├── QueueNotFound
    ├── IllegalTransition       the task's state does not allow the request
    ├── HandlerError            how handlers are declared or found
    ├── SchemaMismatch          the database's schema does not serve this version
    ├── MigrationRefused        the role that migrates lacks a right, or the schema is not ours
    ├── ServerUnfit             a server is set up so that we cannot work, see `findings`
    ├── StoreError              what PostgreSQL said instead of doing it
    │   ├── StoreUnavailable    it cannot serve now; a retry may work
    │   └── StatementRefused    it will not take these values
    ├── TransportError          RabbitMQ, see `transport.amqp`
    ├── EmbeddedDatabaseError   the PostgreSQL under .asyncflow/
    └── HandlerSignal           raised *by* handlers to steer their own attempt
        ├── Retry
        └── Reject

A class carries the values and builds the sentence: what happened, to which thing,
what would have worked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID


class AsyncFlowError(Exception):
    """
    The base of everything AsyncFlow raises on purpose.
    """


@dataclass(frozen=True, slots=True)
class Fault:
    """
    One wrong place in a JSON document.

    `pointer` is an RFC 6901 JSON pointer ("" is the whole document); `detail` says
    what is wrong and what would have worked.
    """

    pointer: str
    detail: str


class InvalidInput(AsyncFlowError):
    """
    Input that no retry will make right.
    """


class InvalidTask(InvalidInput):
    """
    A task, batch or query that was refused; nothing of it was stored.

    Args:
        count: How many faults there are, if `faults` are the first of them only.
    """

    def __init__(self, faults: Sequence[Fault], *, count: int | None = None) -> None:
        self.faults = tuple(faults)
        self.count = len(self.faults) if count is None else count
        super().__init__("; ".join(f"{f.pointer or '/'}: {f.detail}" for f in faults))


class InvalidPayload(InvalidInput):
    """
    A payload that the handler of this name does not take.

    Args:
        count: How many faults there are, if `faults` are the first of them only.
    """

    def __init__(self, name: str, faults: Sequence[Fault], *, count: int | None = None) -> None:
        self.name = name
        self.faults = tuple(faults)
        self.count = len(self.faults) if count is None else count
        places = "; ".join(f"{f.pointer or '/'}: {f.detail}" for f in faults)
        super().__init__(f"The payload does not fit handler {name!r}: {places}")


class InvalidSettings(InvalidInput):
    """
    Settings that contradict each other or are out of range, one sentence per mistake.
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(mistakes))


class TaskNotFound(AsyncFlowError):
    """
    No task of this id is visible to this tenant.
    """

    def __init__(self, task_id: UUID) -> None:
        self.task_id = task_id
        super().__init__(f"There is no task {task_id}.")


class QueueNotFound(AsyncFlowError):
    """
    No task, worker or handler knows a queue of this name.
    """

    def __init__(self, name: str, *, known: Sequence[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(f"There is no queue {name!r}; there are {', '.join(known) or 'none'}.")


class IllegalTransition(AsyncFlowError):
    """
    The task's present state does not allow what was asked; nothing was changed.
    """

    def __init__(self, task_id: UUID, *, verb: str, state: str, allowed: Sequence[str]) -> None:
        self.task_id = task_id
        self.state = state
        self.allowed = tuple(allowed)
        states = ", ".join(allowed[:-1]) + " or " + allowed[-1] if len(allowed) > 1 else allowed[0]
        super().__init__(f"Task {task_id} is {state}; only {states} tasks can be {verb}.")


class HandlerError(AsyncFlowError):
    """
    A handler that is declared wrongly, or a module of handlers that cannot be loaded.
    """


class SchemaMismatch(AsyncFlowError):
    """
    The database's schema is missing, older than this version of AsyncFlow needs, or so new that it
    no longer serves it.
    """

    def __init__(self, *, found: str | None, needed: str, is_newer: bool = False) -> None:
        self.found = found
        self.needed = needed
        if found is None:
            fact = "The database has no AsyncFlow schema"
        else:
            fact = f"The database has schema {found}, this version needs {needed}"
        if is_newer:
            remedy = "deploy a newer version of AsyncFlow, migrating again would not help"
        else:
            remedy = "run `asyncflow migrate` with the version you are deploying"
        super().__init__(f"{fact}; {remedy}.")


class MigrationRefused(AsyncFlowError):
    """
    The schema cannot be changed as things are; the sentence says what would help.
    """


class StoreError(AsyncFlowError):
    """
    PostgreSQL did not do what it was asked. Who has no values of a user to blame waits and tries
    again: even a refusal may come from a user's trigger, and pass.
    """


class StoreUnavailable(StoreError):
    """
    PostgreSQL cannot serve the call now: down, starting, read-only, full, out of connections, or
    without a right or a table that the call needs.

    The call changed nothing that the caller may rely on; the same call may work later.

    Attributes:
        sqlstate: What PostgreSQL said; None if it could not be reached or did not answer.
        session_lives: It answered and refused, and the connection is as good as before.
    """

    def __init__(
        self, fact: str, *, sqlstate: str | None = None, session_lives: bool = False
    ) -> None:
        self.sqlstate = sqlstate
        self.session_lives = session_lives
        super().__init__(fact)


class StatementRefused(StoreError):
    """
    PostgreSQL will not take these values, now or ever; nothing was changed.

    The message names no value: they may be payloads, and errors end up in logs.
    """

    def __init__(self, kind: str, *, constraint: str | None) -> None:
        self.kind = kind
        self.constraint = constraint
        by = f" by constraint {constraint}" if constraint else ""
        super().__init__(f"PostgreSQL refused the values of a statement{by} ({kind}).")


class TransportError(AsyncFlowError):
    """
    RabbitMQ cannot serve the call now; tasks stay safe in PostgreSQL meanwhile.
    """


class EmbeddedDatabaseError(AsyncFlowError):
    """
    The embedded PostgreSQL cannot be set up, started or stopped.
    """


AFTER_SECONDS_MAX = 86_400 * 365
"""The longest wait that a handler may ask for: a year."""


class HandlerSignal(AsyncFlowError):
    """
    The base of what a handler raises to steer its own attempt.
    """


class Retry(HandlerSignal):
    """
    Raised by a handler: this attempt failed, try again.

    Counts against `max_attempts`.

    Args:
        reason: Kept with the attempt, for people.
        after_seconds: Delay before the next attempt, 0 or more; None lets the
            handler's backoff decide.
    """

    def __init__(self, reason: str = "", *, after_seconds: float | None = None) -> None:
        if after_seconds is not None and not 0 <= after_seconds <= AFTER_SECONDS_MAX:
            raise ValueError(f"after_seconds is {after_seconds}; it must lie in 0 … one year.")
        self.reason = reason
        self.after_seconds = after_seconds
        super().__init__(reason or "The handler asked for a retry.")


class Reject(HandlerSignal):
    """
    Raised by a handler: this task can never succeed; fail it now, whatever attempts are left.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        super().__init__(reason or "The handler rejected the task.")
