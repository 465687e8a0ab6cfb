"""
The store that workers work on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from asyncflow.store.database import Database
from tests.support import tasks


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """
    An empty store.
    """
    async with tasks.database(database_url) as db:
        yield db
