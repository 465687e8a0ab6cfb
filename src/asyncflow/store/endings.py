"""
The end of a task: the one place that composes what it sets off, in the same transaction.

Five statements end tasks: three settle an attempt (`settle`), one cancels a task that waits
(`steer`), one expires tasks (`upkeep`). All of them are built here, so that whatever the end of a
task has to set off is added here, once, for the rows that were ended. Today it sets off nothing.
"""

from __future__ import annotations

from asyncflow.domain.states import State


def ending(state: State, *, setting: str, where: str, choosing: str = "") -> str:
    """
    The statement that ends tasks in a terminal `state`; returns the id and lease of each.

    Args:
        setting: What else to write: one or more assignments.
        where: Which tasks, `t`, and in which state they must be.
        choosing: A WITH clause that chooses them.
    """
    return f"""
    {choosing}
    UPDATE asyncflow.tasks t
       SET state = '{state}',
           {setting},
           finished_at = now()
     WHERE {where}
    RETURNING t.id, t.lease_id
"""
