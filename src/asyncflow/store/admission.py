"""
Which tasks may start now: the one text of it, as pieces of SQL.

A task may start if it waits, is due, has not expired, is offered by name, and its queue is not
paused; among several, the highest priority goes first, then the longest due. Both engines ask
exactly that, and so does whatever explains or measures it. So no statement spells it out: each is
built from these pieces when its module is imported.

    claims   CLAIM_DUE (no broker), CLAIM_HINTED (RabbitMQ)
    due      ADMISSIBLE, what the relay may send; OLDEST_PENDING, the low-water mark
    hints    OPEN_QUEUES, the queues that the relay may send for
    read     GET: why is it waiting?
    unserved tasks that are due and that no worker offers

In every piece, `t` is the task.
"""

from __future__ import annotations

IS_PENDING = "t.queued_at IS NULL AND t.lease_id IS NULL"
"""Waits, and no hint is out for it; in the terms of index `tasks_due`."""

IS_QUEUED = "t.queued_at IS NOT NULL AND t.lease_id IS NULL"
"""Waits, and a hint is out for it; in the terms of index `tasks_queued`."""

IS_DUE = "t.run_at <= now()"

IS_UNEXPIRED = "(t.expires_at IS NULL OR t.expires_at > now())"


def is_offered(names: str) -> str:
    """
    A worker offers its name; `names` is an array.
    """
    return f"t.name = ANY ({names})"


def is_paused(queue: str) -> str:
    """
    Tasks of `queue` may not start.
    """
    return f"""EXISTS (SELECT FROM asyncflow.queues q
                        WHERE q.name = {queue} AND q.paused_at IS NOT NULL)"""


def may_start(*, names: str) -> str:
    """
    A task that waits on an open queue may start now.
    """
    return f"{IS_DUE} AND {IS_UNEXPIRED} AND {is_offered(names)}"


def first_of(
    *, queue: str, priority: str, condition: str, limit: str, columns: str = "t.id", lock: str = ""
) -> str:
    """
    A subquery: the pending tasks of one queue and priority, longest due first.

    One range of index `tasks_due`: tasks that are not due yet are never stepped over, however many
    there are.
    """
    return f"""
           SELECT {columns}
             FROM asyncflow.tasks_live t
            WHERE {IS_PENDING}                          -- index tasks_due
              AND t.queue = {queue}
              AND t.priority = {priority}
              AND {condition}
            ORDER BY t.run_at, t.id
            LIMIT {limit}
            {lock}"""
