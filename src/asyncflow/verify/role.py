"""
The PostgreSQL role of the processes of a run. It has only the privileges that AsyncFlow needs, as
in a careful deployment, so that a fault can revoke some of them.
"""

from __future__ import annotations

import secrets

import asyncpg

ROLE = "asyncflow_verified"

MAKE = f"""
    CREATE ROLE {ROLE} LOGIN PASSWORD '{{password}}'
"""

GRANT = f"""
    GRANT USAGE ON SCHEMA asyncflow TO {ROLE};
    GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA asyncflow TO {ROLE}
"""

REVOKE = f"""
    REVOKE {{right}} FROM {ROLE}
"""

RIGHTS = (
    "USAGE ON SCHEMA asyncflow",
    "ALL ON ALL TABLES IN SCHEMA asyncflow",
    "INSERT ON ALL TABLES IN SCHEMA asyncflow",
    "UPDATE ON ALL TABLES IN SCHEMA asyncflow",
    "SELECT, UPDATE ON asyncflow.workers",
    "UPDATE ON asyncflow.tasks",
)


async def make_role(url: str) -> str:
    """
    Create the role and return its login, `user:password`.

    Args:
        url: The superuser's URL of a database with AsyncFlow's schema.
    """
    password = secrets.token_urlsafe(16)
    await _execute(url, MAKE.format(password=password))
    await give_back(url)
    return f"{ROLE}:{password}"


async def take_away(url: str, right: str) -> None:
    """
    Revoke one of `RIGHTS` from the role.
    """
    await _execute(url, REVOKE.format(right=right))


async def give_back(url: str) -> None:
    """
    Grant the role every privilege again.
    """
    await _execute(url, GRANT)


async def _execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()
