"""
The table of SQLSTATEs is complete, and problems that pass are waited out.
"""

from __future__ import annotations

from collections.abc import Iterator

import asyncpg
import pytest

from asyncflow.errors import StatementRefused, StoreUnavailable
from asyncflow.store.database import translated_errors
from asyncflow.store.sqlstates import MEANINGS, Meaning, meaning_of, meaning_of_state

PASSES_BY_ITSELF = {
    "42501": "a right is missing, or row-level security refuses",
    "42P01": "undefined_table",
    "3F000": "invalid_schema_name",
    "42703": "undefined_column",
    "42883": "undefined_function",
    "42P10": "a primary key that ON CONFLICT needs is still being restored",
    "42804": "a column has another type",
    "42809": "a table is a view now",
    "0A000": "cached plan must not change result type",
    "25006": "read_only_sql_transaction",
    "25P03": "idle_in_transaction_session_timeout",
    "25P04": "transaction_timeout",
    "26000": "prepared on another connection of a pooler",
    "42P05": "prepared already on another connection of a pooler",
    "28000": "a role that may not log in",
    "28P01": "invalid_password",
    "3D000": "invalid_catalog_name",
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "53400": "configuration_limit_exceeded",
    "55006": "object_in_use",
    "55P03": "lock_timeout",
    "57014": "statement_timeout",
    "57P01": "admin_shutdown",
    "57P02": "crash_shutdown",
    "57P03": "cannot_connect_now",
    "57P05": "idle_session_timeout",
    "58030": "io_error",
    "08006": "connection_failure",
    "08P01": "protocol_violation, as poolers say it",
    "XX000": "internal_error",
    "XX001": "data_corrupted",
    "ZZ999": "a state that nobody has heard of",
}
EXPECTED = {
    "22P02": Meaning.REFUSED,
    "23505": Meaning.REFUSED,
    "54001": Meaning.REFUSED,
    "P0001": Meaning.REFUSED,
    "40001": Meaning.ROLLED_BACK,
    "40P01": Meaning.ROLLED_BACK,
    "42601": Meaning.BUG,
    "42P02": Meaning.BUG,
}


def errors(base: type[Exception]) -> Iterator[type[Exception]]:
    """
    This class and all of its subclasses.
    """
    yield base
    for child in base.__subclasses__():
        yield from errors(child)


def test_every_error_that_the_client_knows_has_a_kind() -> None:
    """
    Every error of the client has an entry by its SQLSTATE or class, not by default.
    """
    known = [getattr(error, "sqlstate", None) for error in errors(asyncpg.PostgresError)]
    states = {state for state in known if state is not None}

    assert len(states) > 200
    assert [] == sorted(s for s in states if s not in MEANINGS and s[:2] not in MEANINGS)


def test_the_table_has_no_state_that_does_not_exist() -> None:
    """
    A typo would leave an entry that never applies.
    """
    states = {str(getattr(error, "sqlstate", "")) for error in errors(asyncpg.PostgresError)}
    states |= {f"{state[:2]}" for state in states}

    assert set() == MEANINGS.keys() - states


def test_an_error_of_the_connection_asks_for_another_one() -> None:
    """
    Every connection error of the client and the operating system asks for a new connection.
    """
    for base in (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
        for error in errors(base):
            assert Meaning.RECONNECT is meaning_of(error.__new__(error))
    assert None is meaning_of(KeyError())


@pytest.mark.parametrize("state", PASSES_BY_ITSELF)
def test_what_passes_by_itself_is_waited_out(state: str) -> None:
    """
    A passing problem raises StoreUnavailable with PostgreSQL's message, without the DETAIL, which
    may quote values.
    """
    error = asyncpg.PostgresError.new(
        {"C": state, "M": "words of the server", "D": "Key (payload)=(4111) exists."}
    )

    with pytest.raises(StoreUnavailable, match="words of the server") as unavailable:
        with translated_errors():
            raise error

    assert "4111" not in str(unavailable.value)
    assert state == unavailable.value.sqlstate
    assert unavailable.value.session_lives is (meaning_of(error) is Meaning.WAIT)


@pytest.mark.parametrize("state", EXPECTED)
def test_what_does_not_pass_is_told_apart(state: str) -> None:
    """
    Values that cannot be stored, statements that can be repeated immediately, and our own bugs are
    distinguished.
    """
    assert EXPECTED[state] is meaning_of_state(state)


def test_an_error_that_ends_the_session_does_not_leave_it_alive() -> None:
    """
    An error that PostgreSQL calls fatal ends the session, whatever its SQLSTATE.
    """
    error = asyncpg.PostgresError.new({"C": "42501", "M": "no", "S": "FATAL", "V": "FATAL"})

    with pytest.raises(StoreUnavailable) as unavailable:
        with translated_errors():
            raise error

    assert not unavailable.value.session_lives


def test_a_row_without_a_partition_is_not_the_fault_of_its_values() -> None:
    """
    A check violation without a constraint means that a partition is missing, not that the values
    are invalid.
    """
    without = asyncpg.PostgresError.new({"C": "23514", "M": "no partition"})
    by_constraint = asyncpg.PostgresError.new({"C": "23514", "M": "no", "n": "tasks_check"})

    assert Meaning.WAIT is meaning_of(without)
    with pytest.raises(StatementRefused, match="tasks_check"), translated_errors():
        raise by_constraint


def test_a_mistake_of_ours_stays_what_it_is() -> None:
    """
    A bug of ours is raised as it is, since waiting would hide it.
    """
    with pytest.raises(asyncpg.PostgresSyntaxError), translated_errors():
        raise asyncpg.PostgresSyntaxError("syntax error")
