"""
What an error of PostgreSQL means for whoever ran the statement, as a table.

PostgreSQL is often administered by others, who take rights away, restore a schema, fail over or
set timeouts while AsyncFlow runs. All of that passes, so it is waited out and charged to nobody.
What does not pass is of two kinds: values that cannot be stored, and mistakes of ours.

`KINDS` goes by SQLSTATE (PostgreSQL, "Error Codes"): the first two characters name a class, and
a state that differs from its class has an entry of its own. What is in neither, say from a newer
server or from a pooler, cannot be our mistake: it is waited out. `database` turns kinds into
errors.
"""

from __future__ import annotations

from enum import Enum

import asyncpg


class Kind(Enum):
    """
    What an error means.

    Attributes:
        REFUSED: The values of this statement are at fault; others may be stored.
        ROLLED_BACK: PostgreSQL undid the statement; it can be repeated at once.
        WAIT: PostgreSQL answers and cannot serve now. The session is as good as before.
        RECONNECT: This session cannot serve, or not any more; another one may.
        BUG: The statement is wrong, whatever the server and the values.
    """

    REFUSED = "the values are at fault"
    ROLLED_BACK = "undone, can be repeated"
    WAIT = "cannot serve now"
    RECONNECT = "this session cannot serve"
    BUG = "a mistake of ours"


KINDS: dict[str, Kind] = {
    "03": Kind.BUG,  # SQL statement not yet complete
    "08": Kind.RECONNECT,  # connection exception
    # A trigger or function, which can only be somebody else's, judges the values.
    "09": Kind.REFUSED,  # triggered action exception
    "0A": Kind.RECONNECT,  # feature not supported: a plan cached by this session is out of date
    "0B": Kind.BUG,  # invalid transaction initiation
    "0F": Kind.BUG,  # locator exception
    "0L": Kind.WAIT,  # invalid grantor
    "0P": Kind.WAIT,  # invalid role specification
    "0Z": Kind.REFUSED,  # diagnostics exception, in a function
    "10": Kind.BUG,  # XQuery error
    "20": Kind.REFUSED,  # case not found, in a function
    "21": Kind.BUG,  # cardinality violation
    "22": Kind.REFUSED,  # data exception
    "23": Kind.REFUSED,  # integrity constraint violation
    "24": Kind.BUG,  # invalid cursor state
    "25": Kind.RECONNECT,  # invalid transaction state: read-only, or left behind by a pooler
    "26": Kind.RECONNECT,  # invalid SQL statement name: prepared on another server connection
    "27": Kind.REFUSED,  # triggered data change violation
    "28": Kind.RECONNECT,  # invalid authorization specification
    "2B": Kind.BUG,  # dependent privilege descriptors still exist
    "2D": Kind.BUG,  # invalid transaction termination
    "2F": Kind.REFUSED,  # SQL routine exception
    "34": Kind.BUG,  # invalid cursor name
    "38": Kind.REFUSED,  # external routine exception
    "39": Kind.REFUSED,  # external routine invocation exception
    "3B": Kind.BUG,  # savepoint exception
    "3D": Kind.RECONNECT,  # invalid catalog name: the database does not exist
    "3F": Kind.WAIT,  # invalid schema name
    "40": Kind.ROLLED_BACK,  # transaction rollback
    "40003": Kind.WAIT,  # statement completion unknown
    # A right, table, column or function that our statements need is missing or another: the
    # statements are tested against the schema, so somebody is changing that.
    "42": Kind.WAIT,  # syntax error or access rule violation
    "42601": Kind.BUG,  # syntax error
    "42602": Kind.BUG,  # invalid name
    "42622": Kind.BUG,  # name too long
    "42712": Kind.BUG,  # duplicate alias
    "42803": Kind.BUG,  # grouping error
    "42939": Kind.BUG,  # reserved name
    "42P02": Kind.BUG,  # undefined parameter
    "42P03": Kind.BUG,  # duplicate cursor
    "42P05": Kind.RECONNECT,  # duplicate prepared statement: a pooler's connection has it
    "42P08": Kind.BUG,  # ambiguous parameter
    "42P09": Kind.BUG,  # ambiguous alias
    "42P11": Kind.BUG,  # invalid cursor definition
    "42P14": Kind.BUG,  # invalid prepared statement definition
    "42P18": Kind.BUG,  # indeterminate data type
    "42P19": Kind.BUG,  # invalid recursion
    "42P20": Kind.BUG,  # windowing error
    "44": Kind.REFUSED,  # WITH CHECK OPTION violation
    "53": Kind.WAIT,  # insufficient resources: disk, memory, configured limits
    "53300": Kind.RECONNECT,  # too many connections
    "54": Kind.REFUSED,  # program limit exceeded: JSON nested too deep for its stack, say
    "55": Kind.WAIT,  # object not in prerequisite state: in use, lock_timeout
    "57": Kind.RECONNECT,  # operator intervention: shutdown, starting, idle_session_timeout
    "57014": Kind.WAIT,  # query canceled: statement_timeout, pg_cancel_backend
    "58": Kind.WAIT,  # system error
    "72": Kind.WAIT,  # snapshot too old
    "F0": Kind.WAIT,  # configuration file error
    "HV": Kind.WAIT,  # foreign data wrapper error
    "P0": Kind.REFUSED,  # PL/pgSQL error: somebody's trigger judges the values
    "XX": Kind.WAIT,  # internal error, corrupted data or index
}

MISSING = frozenset({"3F000", "42P01", "42703", "42883", "42P10"})
"""A schema, table, column, function or primary key is not there."""

NO_RIGHT = "42501"
"""A right is missing, or a row-level security policy lets nothing through."""


def kind_of_state(sqlstate: str | None) -> Kind:
    """
    What this SQLSTATE means; None and unknown ones are waited out.
    """
    if sqlstate is None:
        return Kind.WAIT
    return KINDS.get(sqlstate) or KINDS.get(sqlstate[:2]) or Kind.WAIT


def kind_of(error: BaseException) -> Kind | None:
    """
    What this error means; None if it is neither PostgreSQL's nor the connection's.
    """
    match error:
        case asyncpg.CheckViolationError() if not error.constraint_name:
            # No constraint refuses the row: the partition that it belongs in is missing.
            return Kind.WAIT
        case asyncpg.PostgresError():
            return kind_of_state(error.sqlstate)
        case asyncpg.InterfaceError() | asyncpg.InternalClientError() | OSError():
            # Closed, closing, silent for too long (TimeoutError is an OSError), or the server's
            # farewell is still being read.
            return Kind.RECONNECT
        case _:
            return None
