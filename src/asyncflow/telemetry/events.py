"""
Every event that AsyncFlow logs: one function each, with a stable name.

INFO is at most one line per attempt. WARNING means that the event may need attention, ERROR that
it does. Payloads, results and secrets are never arguments here.
"""

from __future__ import annotations

from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as quoted
from uuid import UUID

from asyncflow.telemetry.logs import log

# Processes


def process_started(**facts: object) -> None:
    """
    A process is ready for work.
    """
    log.info("process.started", **facts)


def settings_unknown(*, names: Sequence[str]) -> None:
    """
    Variables that begin with ASYNCFLOW_ but are not settings of this version have no effect.
    """
    log.warning("settings.unknown", names=",".join(names))


def process_stopping(*, signal: str, running: int | None = None) -> None:
    """
    A signal asked the process to stop. `running` attempts of a worker may still finish; None for
    processes that run no attempts.
    """
    facts = {} if running is None else {"running": running}
    log.info("process.stopping", signal=signal, **facts)


def process_force_quit(*, signal: str) -> None:
    """
    A second signal came: running attempts are released now.
    """
    log.warning("process.force_quit", signal=signal)


def signals_retaken(*, signals: str) -> None:
    """
    A handler or library had replaced the handling of these signals; it has been restored.
    """
    log.warning("process.signals_retaken", signals=signals)


def process_blocked() -> None:
    """
    The grace period is over and the event loop is blocked; the process exits anyway.
    """
    log.error("process.blocked")


def process_stopped() -> None:
    """
    The process ended gracefully.
    """
    log.info("process.stopped")


def child_process_ended(*, role: str, pid: int, status: str, restart_seconds: float) -> None:
    """
    A supervised process ended unexpectedly; another starts after `restart_seconds`.
    """
    log.error("process.died", role=role, pid=pid, status=status, restart_seconds=restart_seconds)


# Attempts


def attempt_settled(
    *,
    task_id: UUID,
    name: str,
    queue: str,
    tenant_id: int,
    attempt: int,
    outcome: str,
    run_seconds: float,
    failure: str | None,
    retry_seconds: float | None,
) -> None:
    """
    An attempt ended and its outcome is recorded.
    """
    if not log.takes_info and outcome != "failed":
        return
    if outcome == "completed" and log.json_lines is not None:
        # Logged thousands of times per second; encoding it by hand halves the cost.
        log.json_lines.emit_encoded(
            "attempt.settled",
            f'"task_id": "{task_id}", "name": {quoted(name)}, "queue": {quoted(queue)}, '
            f'"tenant": {tenant_id}, "attempt": {attempt}, "outcome": "completed", '
            f'"run_seconds": {round(run_seconds, 4)}',
        )
        return
    fields = {
        "task_id": str(task_id),
        "name": name,
        "queue": queue,
        "tenant": tenant_id,
        "attempt": attempt,
        "outcome": outcome,
        "run_seconds": round(run_seconds, 4),
    }
    if failure is not None:
        fields["failure"] = failure
    if retry_seconds is not None:
        fields["retry_seconds"] = round(retry_seconds, 3)
    if outcome == "failed":
        log.warning("attempt.settled", **fields)
    else:
        log.info("attempt.settled", **fields)


def attempt_void(*, task_id: UUID, name: str, attempt: int, reason: str) -> None:
    """
    An attempt's lease was lost; its outcome was discarded.
    """
    log.warning("attempt.void", task_id=str(task_id), name=name, attempt=attempt, reason=reason)


def attempt_stuck(*, task_id: UUID, name: str, attempt: int) -> None:
    """
    A handler ignores that its attempt is over; its slot stays taken until it returns.
    """
    log.error("attempt.stuck", task_id=str(task_id), name=name, attempt=attempt)


def settle_delayed(*, task_id: UUID, reason: str) -> None:
    """
    An outcome cannot be written now; the worker keeps trying while the lease holds.
    """
    log.warning("settle.delayed", task_id=str(task_id), reason=reason)


# Workers


def worker_declared_lost(*, worker_id: UUID, name: str) -> None:
    """
    The reaper declared a worker dead.
    """
    log.warning("worker.lost", worker_id=str(worker_id), name=name)


def worker_fenced(*, worker_id: UUID, reason: str, running: int) -> None:
    """
    This worker can no longer trust its leases and stopped its attempts.
    """
    log.error("worker.fenced", worker_id=str(worker_id), reason=reason, running=running)


def worker_stalled(
    *, seconds: float, blamed: Sequence[tuple[UUID, str]], running: int, stack: str
) -> None:
    """
    A handler blocks the event loop, and with it every `async def` attempt of this worker.

    `blamed` is the id and name of the task to blame, or of all that may be; `stack` shows where.
    """
    log.error(
        "worker.stalled",
        seconds=round(seconds, 1),
        task_id=",".join(str(task_id) for task_id, _ in blamed),
        name=",".join(dict.fromkeys(name for _, name in blamed)),
        running=running,
        stack=stack,
    )


def worker_exhausted(*, worker_id: UUID, slots: int) -> None:
    """
    Handlers that ignore the end of their attempts hold every slot: the worker ends.
    """
    log.error("worker.exhausted", worker_id=str(worker_id), slots=slots)


def handler_not_taken(*, name: str, queue: str, queues: Sequence[str]) -> None:
    """
    This worker has a handler whose queue it does not serve.
    """
    log.warning("handler.not_taken", name=name, queue=queue, queues=",".join(queues))


def worker_starved(*, reason: str, pause_seconds: float) -> None:
    """
    The machine has no process, thread or file descriptor left for an attempt: its task was
    released, and the worker takes no more for `pause_seconds`.
    """
    log.warning("worker.starved", reason=reason, pause_seconds=pause_seconds)


def loop_interrupted(*, reason: str) -> None:
    """
    An asyncio task or callback left behind by a handler tried to end the process.
    """
    log.error("loop.interrupted", reason=reason)


def heartbeat_failed(*, reason: str) -> None:
    """
    A heartbeat could not be written; the leases last a while longer.
    """
    log.warning("heartbeat.failed", reason=reason)


def orphans_released(*, count: int) -> None:
    """
    Claims whose answer never reached this worker were released.
    """
    log.warning("claims.orphaned", count=count)


# Database and broker


def database_unavailable(*, where: str, reason: str) -> None:
    """
    PostgreSQL is unavailable; `where` waits and tries again.
    """
    log.warning("database.unavailable", where=where, reason=reason)


def server_doubtful(*, what: str, reason: str) -> None:
    """
    A check at the start found something that works less well or less safely than it could.
    """
    log.warning("server.doubtful", what=what, reason=reason)


def broker_connected(*, role: str, url: str) -> None:
    """
    A connection to RabbitMQ is open. The password in `url` is masked.
    """
    log.info("broker.connected", role=role, url=url)


def broker_unavailable(*, role: str, reason: str, may_pass: bool) -> None:
    """
    RabbitMQ is unreachable or closed the connection. If that will not pass without a change, it
    is logged as the error `broker.refused`. Tasks are accepted all the same.
    """
    if may_pass:
        log.warning("broker.unavailable", role=role, reason=reason)
    else:
        log.error("broker.refused", role=role, reason=reason)


def broker_queue_unusable(*, role: str, queue: str, reason: str) -> None:
    """
    A queue in RabbitMQ does not answer or has other properties than ours; it is retried later.
    """
    log.error("broker.queue_unusable", role=role, queue=queue, reason=reason)


def broker_blocked(*, role: str, reason: str) -> None:
    """
    RabbitMQ accepts no messages: it is short of memory or disk space.
    """
    log.warning("broker.blocked", role=role, reason=reason)


def message_unreadable(*, queue: str, body_bytes: int) -> None:
    """
    A message is not a hint; it was moved to the dead-letter queue.
    """
    log.warning("message.unreadable", queue=queue, body_bytes=body_bytes)


def hints_not_sent(*, queue: str, count: int, reason: str) -> None:
    """
    RabbitMQ did not accept some hints; their tasks stay pending, and the relay sends them again.
    """
    log.warning("hints.not_sent", queue=queue, count=count, reason=reason)


def hints_dropped(*, queue: str, cause: str, count: int) -> None:
    """
    A policy made RabbitMQ drop hints from a queue; the relay sends them again.
    """
    log.warning("hints.dropped", queue=queue, cause=cause, count=count)


def hints_unknown(*, count: int) -> None:
    """
    Hints arrived for tasks that are not in this database; logged at most once a minute.
    """
    log.warning("hints.unknown", count=count)


def hints_lost(*, queue: str, count: int) -> None:
    """
    Queued tasks had lost their message; they are pending again.
    """
    log.warning("hints.lost", queue=queue, count=count)


# Maintenance


def leases_reaped(*, count: int) -> None:
    """
    Attempts of dead workers were settled.
    """
    log.warning("leases.reaped", count=count)


def tasks_expired(*, count: int) -> None:
    """
    Waiting tasks passed their `expires_at`.
    """
    log.info("tasks.expired", count=count)


def tasks_unqueued(*, count: int) -> None:
    """
    Tasks were queued for a broker that is no longer used; workers take them directly now.
    """
    log.warning("tasks.unqueued", count=count)


def tasks_moved(*, count: int) -> None:
    """
    Tasks that waited in `default` since before their handler was known are in its own queue now.
    """
    log.info("tasks.moved", count=count)


def tasks_pruned(*, count: int) -> None:
    """
    Finished tasks older than the retention were deleted.
    """
    log.info("tasks.pruned", count=count)


def tasks_unserved(
    *, queue: str, name: str, count: int, is_more: bool, waiting_seconds: float
) -> None:
    """
    `count` tasks are due and no live worker offers their name on their queue; logged once.
    """
    log.warning(
        "tasks.unserved",
        queue=queue,
        name=name,
        count=f"{count} or more" if is_more else count,
        waiting_seconds=round(waiting_seconds, 1),
    )


def tasks_served(*, queue: str, name: str) -> None:
    """
    Tasks that were unserved no longer are: a worker offers them, or they are gone.
    """
    log.info("tasks.served", queue=queue, name=name)


def maintenance_gone(*, silent_seconds: float | None) -> None:
    """
    An API or worker process sees no active maintenance process; logged every ten minutes.
    """
    seconds = None if silent_seconds is None else round(silent_seconds, 1)
    log.warning("maintenance.gone", silent_seconds=seconds)


def maintenance_back() -> None:
    """
    Maintenance is active again.
    """
    log.info("maintenance.back")


def chore_failed(*, chore: str, reason: str) -> None:
    """
    A maintenance chore failed; it runs again at its next turn.
    """
    log.warning("chore.failed", chore=chore, reason=reason)


# HTTP


def api_unprotected(*, host: str) -> None:
    """
    The API listens beyond this machine and has no authentication.
    """
    log.warning("api.unprotected", host=host)


def handlers_conflict(*, name: str, queues: Sequence[str]) -> None:
    """
    Live workers declare handlers with one name on several queues that accept different payloads.
    """
    log.warning("handlers.conflict", name=name, queues=",".join(queues))


def payload_schema_unusable(*, name: str, reason: str) -> None:
    """
    A published payload schema cannot be compiled; only workers validate payloads now.
    """
    log.warning("payload_schema.unusable", name=name, reason=reason)


def request_failed(*, incident_id: str, method: str, path: str, error: Exception) -> None:
    """
    A request ended in an internal error; the log line carries the traceback.
    """
    log.error("request.failed", incident_id=incident_id, method=method, path=path, exc_info=error)
