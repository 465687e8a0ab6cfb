"""
The rules of this repository that no linter checks.

Lists of exceptions name what breaks a rule today. They may shrink but must not grow.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.choice import NOT_QUICK, SLOW

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "asyncflow"

# A forked process must find modules in its folder, as a newly started one does.
MAY_CHANGE_SYS_PATH = {"tests/support/forked.py"}

PATCHED_CONSTANTS = {
    # The program as another version of it, or with a planted mistake.
    "tests/store/test_migrations.py": 4,
    "tests/store/test_model.py": 1,
    "tests/test_docs.py": 1,
    # A listener that reconnects sooner; the transport creates its own, so no argument reaches it.
    "tests/acceptance/test_what_is_taken_away.py": 1,
}
"""How many patches of our own constants a file may have."""

SHARED_CLASS_NAMES = {"Parts", "Times"}
"""Names that two public classes may share: each file with timings has its own `Times`."""


def files(*folders: str) -> list[Path]:
    """
    Every Python file in these folders of the repository.
    """
    found = [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]
    assert found
    return sorted(found)


@cache
def parsed(file: Path) -> ast.Module:
    """
    The syntax tree of a file.
    """
    return ast.parse(file.read_text())


def name_of(file: Path) -> str:
    """
    The path of a file relative to the repository's root.
    """
    return file.relative_to(REPOSITORY).as_posix()


def test_every_module_begins_by_saying_what_it_is_for() -> None:
    """
    Modules of the product, the tests and the benchmarks have a docstring.
    """
    silent = [
        name_of(file)
        for file in files("src", "tests", "bench")
        if file.read_text().strip() and ast.get_docstring(parsed(file)) is None
    ]

    assert [] == silent


def test_no_test_and_no_benchmark_changes_where_modules_are_found() -> None:
    """
    Helpers are imported from `tests.support`; nothing adds a folder to `sys.path`.
    """
    changing = {name_of(file) for file in files("tests", "bench") if changes_sys_path(parsed(file))}

    assert MAY_CHANGE_SYS_PATH == changing


def changes_sys_path(tree: ast.Module) -> bool:
    """
    Whether code assigns to `sys.path` or calls a method that changes it.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=value)) if ast.unparse(value) == "sys.path":
                return True
            case ast.Assign(targets=targets) if any(is_sys_path(target) for target in targets):
                return True
            case ast.AugAssign(target=target) if is_sys_path(target):
                return True
    return False


def is_sys_path(target: ast.expr) -> bool:
    """
    Whether an assignment to `target` changes `sys.path`.
    """
    return ast.unparse(target).partition("[")[0] == "sys.path"


def test_no_test_patches_a_constant_of_ours() -> None:
    """
    A value that a test needs to change, such as a timeout, is a constructor argument instead.
    """
    patched = {name_of(file): list(patched_constants(parsed(file))) for file in files("tests")}

    too_many = {
        name: constants
        for name, constants in patched.items()
        if len(constants) > PATCHED_CONSTANTS.get(name, 0)
    }
    assert {} == too_many


def patched_constants(tree: ast.Module) -> Iterator[str]:
    """
    The calls of `monkeypatch.setattr` that replace a name in capitals.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="setattr"), args=[owner, ast.Constant(value=str(name)), *_]
            ) if name.lstrip("_").isupper():
                yield f"{ast.unparse(owner)}.{name}"
            case ast.Call(
                func=ast.Attribute(attr="setattr"), args=[ast.Constant(value=str(path)), _]
            ):
                if path.startswith("asyncflow.") and path.rpartition(".")[2].isupper():
                    yield path


def test_no_two_public_classes_have_one_name() -> None:
    """
    A class name has one meaning throughout the product.
    """
    places = defaultdict(list)
    for file in files("src"):
        for node in parsed(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(file.relative_to(SOURCE).as_posix())

    shared = {name: where for name, where in places.items() if len(where) > 1}
    assert set() == set(shared) - SHARED_CLASS_NAMES, shared


def test_what_a_quick_run_leaves_out_exists() -> None:
    """
    The list of what a quick run leaves out has no stale names, which would bring a renamed file or
    test back into it.
    """
    tests = REPOSITORY / "tests"
    for name in NOT_QUICK:
        assert (tests / name).exists()
    for name in SLOW:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (tests / file).read_text()
