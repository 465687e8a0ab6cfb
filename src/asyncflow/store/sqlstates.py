"""
What an error of PostgreSQL means for the caller of the statement, as a table.

PostgreSQL is often administered by others, who revoke rights, restore a schema, fail over or set
timeouts while AsyncFlow runs. All of that passes, so it is waited out and counts against no task.
Two kinds of errors do not pass: values that cannot be stored, and bugs of ours.

`MEANINGS` goes by SQLSTATE (PostgreSQL, "Error Codes"): the first two characters name a class, and
a state that differs from its class has an entry of its own. A state without any entry, from a
newer server or from a pooler, cannot be our bug: it is waited out. `database` turns meanings into
errors.
"""

from __future__ import annotations

from enum import Enum

import asyncpg


class Meaning(Enum):
    """
    What an error means.

    Attributes:
        REFUSED: The values of this statement are at fault; others may be stored.
        ROLLED_BACK: PostgreSQL undid the statement; it can be repeated immediately.
        WAIT: PostgreSQL answers but cannot serve now. The session is intact.
        RECONNECT: This session cannot serve, or no longer; another one may.
        BUG: The statement is wrong, whatever the server and the values.
    """

    REFUSED = "the values are at fault"
    ROLLED_BACK = "undone, can be repeated"
    WAIT = "cannot serve now"
    RECONNECT = "this session cannot serve"
    BUG = "a bug of ours"


MEANINGS: dict[str, Meaning] = {
    "03": Meaning.BUG,  # SQL statement not yet complete
    "08": Meaning.RECONNECT,  # connection exception
    # A trigger or function, never one of ours, judges the values.
    "09": Meaning.REFUSED,  # triggered action exception
    "0A": Meaning.RECONNECT,  # feature not supported: a plan cached by this session is out of date
    "0B": Meaning.BUG,  # invalid transaction initiation
    "0F": Meaning.BUG,  # locator exception
    "0L": Meaning.WAIT,  # invalid grantor
    "0P": Meaning.WAIT,  # invalid role specification
    "0Z": Meaning.REFUSED,  # diagnostics exception, in a function
    "10": Meaning.BUG,  # XQuery error
    "20": Meaning.REFUSED,  # case not found, in a function
    "21": Meaning.BUG,  # cardinality violation
    "22": Meaning.REFUSED,  # data exception
    "23": Meaning.REFUSED,  # integrity constraint violation
    "24": Meaning.BUG,  # invalid cursor state
    "25": Meaning.RECONNECT,  # invalid transaction state: read-only, or left behind by a pooler
    "26": Meaning.RECONNECT,  # invalid SQL statement name: prepared on another server connection
    "27": Meaning.REFUSED,  # triggered data change violation
    "28": Meaning.RECONNECT,  # invalid authorization specification
    "2B": Meaning.BUG,  # dependent privilege descriptors still exist
    "2D": Meaning.BUG,  # invalid transaction termination
    "2F": Meaning.REFUSED,  # SQL routine exception
    "34": Meaning.BUG,  # invalid cursor name
    "38": Meaning.REFUSED,  # external routine exception
    "39": Meaning.REFUSED,  # external routine invocation exception
    "3B": Meaning.BUG,  # savepoint exception
    "3D": Meaning.RECONNECT,  # invalid catalog name: the database does not exist
    "3F": Meaning.WAIT,  # invalid schema name
    "40": Meaning.ROLLED_BACK,  # transaction rollback
    "40003": Meaning.WAIT,  # statement completion unknown
    # A right, table, column or function that our statements need is missing or another: the
    # statements are tested against the schema, so the schema is being changed.
    "42": Meaning.WAIT,  # syntax error or access rule violation
    "42601": Meaning.BUG,  # syntax error
    "42602": Meaning.BUG,  # invalid name
    "42622": Meaning.BUG,  # name too long
    "42712": Meaning.BUG,  # duplicate alias
    "42803": Meaning.BUG,  # grouping error
    "42939": Meaning.BUG,  # reserved name
    "42P02": Meaning.BUG,  # undefined parameter
    "42P03": Meaning.BUG,  # duplicate cursor
    "42P05": Meaning.RECONNECT,  # duplicate prepared statement: a pooler's connection has it
    "42P08": Meaning.BUG,  # ambiguous parameter
    "42P09": Meaning.BUG,  # ambiguous alias
    "42P11": Meaning.BUG,  # invalid cursor definition
    "42P14": Meaning.BUG,  # invalid prepared statement definition
    "42P18": Meaning.BUG,  # indeterminate data type
    "42P19": Meaning.BUG,  # invalid recursion
    "42P20": Meaning.BUG,  # windowing error
    "44": Meaning.REFUSED,  # WITH CHECK OPTION violation
    "53": Meaning.WAIT,  # insufficient resources: disk, memory, configured limits
    "53300": Meaning.RECONNECT,  # too many connections
    "54": Meaning.REFUSED,  # program limit exceeded: JSON nested too deep for its stack, say
    "55": Meaning.WAIT,  # object not in prerequisite state: in use, lock_timeout
    "57": Meaning.RECONNECT,  # operator intervention: shutdown, starting, idle_session_timeout
    "57014": Meaning.WAIT,  # query canceled: statement_timeout, pg_cancel_backend
    "58": Meaning.WAIT,  # system error
    "72": Meaning.WAIT,  # snapshot too old
    "F0": Meaning.WAIT,  # configuration file error
    "HV": Meaning.WAIT,  # foreign data wrapper error
    "P0": Meaning.REFUSED,  # PL/pgSQL error: a trigger judges the values
    "XX": Meaning.WAIT,  # internal error, corrupted data or index
}

MISSING = frozenset({"3F000", "42P01", "42703", "42883", "42P10"})
"""A schema, table, column, function or primary key is not there."""

NO_RIGHT = "42501"
"""A right is missing, or a row-level security policy lets nothing through."""


def meaning_of_state(sqlstate: str | None) -> Meaning:
    """
    What this SQLSTATE means; None and unknown ones are waited out.
    """
    if sqlstate is None:
        return Meaning.WAIT
    return MEANINGS.get(sqlstate) or MEANINGS.get(sqlstate[:2]) or Meaning.WAIT


def meaning_of(error: BaseException) -> Meaning | None:
    """
    What this error means; None if it is neither PostgreSQL's nor the connection's.
    """
    match error:
        case asyncpg.CheckViolationError() if not error.constraint_name:
            # No constraint refuses the row: its partition is missing.
            return Meaning.WAIT
        case asyncpg.PostgresError():
            return meaning_of_state(error.sqlstate)
        case asyncpg.InterfaceError() | asyncpg.InternalClientError() | OSError():
            # Closed, closing, timed out (TimeoutError is an OSError), or the server's last message
            # is still being read.
            return Meaning.RECONNECT
        case _:
            return None
