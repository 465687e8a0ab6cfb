"""
Every SQL constant of the store fits the schema.
"""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest

from asyncflow import store
from asyncflow.store import read
from asyncflow.store.database import Database

IS_STATEMENT = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)\b")


def _statements() -> dict[str, str]:
    found = {}
    for module in pkgutil.iter_modules(store.__path__):
        content = vars(importlib.import_module(f"{store.__name__}.{module.name}"))
        found.update(
            {
                f"{module.name}.{name}": text
                for name, text in content.items()
                if name.isupper()
                and name[0] != "_"
                and isinstance(text, str)
                and IS_STATEMENT.match(text)
            }
        )
    # A template, completed by its caller.
    template = found.pop("read.LIST")
    for status, condition in read.STATUS_FILTERS.items():
        found[f"read.LIST {status}"] = template.format(filters=condition)
    found["read.LIST of several"] = template.format(
        filters=read.status_filter(["FAILED", "RUNNING"])
    )
    return found


STATEMENTS = _statements()


def test_the_search_finds_the_statements() -> None:
    """
    The search finds the statements; if it found none, the tests below would prove nothing.
    """
    assert {"claims.CLAIM_DUE", "settle.SETTLE_RETRIED", "upkeep.EXPIRE"} <= set(STATEMENTS)
    assert len(STATEMENTS) > 35


async def test_postgresql_accepts_every_statement(db: Database) -> None:
    """
    PostgreSQL parses and plans every statement against the schema, so every name and type is right.
    """
    connection = await db.connect("statements")
    refused = {}
    for name, statement in STATEMENTS.items():
        try:
            await connection.prepare(statement)
        except Exception as error:
            refused[name] = error
    await connection.close()

    assert not refused


@pytest.mark.parametrize("name", [n for n in STATEMENTS if "LIST " not in n])
def test_every_write_to_a_task_guards_where_it_comes_from(name: str) -> None:
    """
    No UPDATE or DELETE selects a task by its id alone.
    """
    for write in re.split(r"\b(?:UPDATE|DELETE FROM) asyncflow\.tasks\b", STATEMENTS[name])[1:]:
        where = write.partition("WHERE")[2]

        assert re.search(r"\bstate (=|IN) ", where)
