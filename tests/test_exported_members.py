"""
`import asyncflow` offers what it documents, and costs almost nothing until something is used.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

import asyncflow


@pytest.mark.parametrize("name", asyncflow.__all__)
def test_every_exported_name_exists(name: str) -> None:
    """
    Every exported name can be imported.
    """
    assert getattr(asyncflow, name) is not None


def test_exported_names_are_sorted_and_listed_by_dir() -> None:
    """
    `dir` lists the exported names, so that completion in an editor or a shell finds them.
    """
    assert sorted(asyncflow.__all__) == asyncflow.__all__
    assert set(asyncflow.__all__) <= set(dir(asyncflow))


def test_an_unknown_name_is_an_attribute_error() -> None:
    """
    An unknown name raises AttributeError, on which `hasattr` depends.
    """
    with pytest.raises(AttributeError, match="'asyncflow' has no attribute 'job'"):
        _ = asyncflow.job


def test_importing_the_package_imports_nothing_else() -> None:
    """
    Importing the package loads none of its modules: a web application that only needs an error
    class does not pay for a worker.
    """
    code = "import sys, asyncflow; print(*[m for m in sys.modules if m.startswith('asyncflow')])"
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    assert ["asyncflow"] == printed.stdout.split()
