"""
What happens to a test whose server is missing on this machine.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def is_everything_wanted() -> bool:
    """
    Tell whether a skipped test would hide something: in CI and in `bin/test`.
    """
    return os.environ.get("CI") == "true" or os.environ.get("ASYNCFLOW_TEST_ALL") == "1"


def missing(service: str, help: str) -> NoReturn:
    """
    Skip the test when `pytest` is run by hand; else fail it.
    """
    sentence = f"{service} is missing: {help}"
    if is_everything_wanted():
        pytest.fail(sentence, pytrace=False)
    pytest.skip(sentence)
