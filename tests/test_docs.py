"""
What the documentation mentions exists, and what exists is documented.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from click.testing import CliRunner

from asyncflow.cli.app import app
from asyncflow.handlers import Registry
from asyncflow.settings import PREFIX, Range, Settings
from asyncflow.wire.submissions import SubmitTask

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
EVENTS = ROOT / "src" / "asyncflow" / "telemetry" / "events.py"

NAMES_OF_TESTS_AND_TOOLS = re.compile(rf"{PREFIX}(?:TEST_\w+|PYTHON)$")


def in_pages(pattern: str) -> list[Any]:
    """
    Every match in every page, with its page, as parameters of a test.
    """
    return [
        pytest.param(page, match[1], id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, match in enumerate(re.finditer(pattern, page.read_text(), re.M | re.S), 1)
    ]


# Settings


DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}


def default_of(name: str) -> str:
    """
    A setting's default in the notation of the docs; empty if there is none.
    """
    value = DEFAULTS[name]
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def range_of(name: str) -> str:
    """
    The range of a numeric setting.
    """
    reader = get_type_hints(Settings, include_extras=True)[name].__metadata__[0]
    return f"{reader.low} … {reader.high}" if isinstance(reader, Range) else ""


def test_the_example_of_an_environment_lists_every_setting_with_its_default() -> None:
    """
    `.env.example` is complete, and a copy of it changes nothing.
    """
    text = (ROOT / ".env.example").read_text()
    listed = dict(re.findall(rf"^# {PREFIX}(\w+)=(.*)$", text, re.M))
    examples = {"DATABASE_URL", "BROKER_URL"}

    assert {name.upper() for name in DEFAULTS} == set(listed)
    for name in DEFAULTS:
        if name.upper() not in examples:
            assert listed[name.upper()] == default_of(name)
    assert not re.search(r"^\w+=", text, re.M)


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_table_of_settings_is_true(name: str) -> None:
    """
    The table has every setting with its default and, for a number, its range.
    """
    row = re.search(rf"^\| `{PREFIX}{name.upper()}` \|([^|]*)\|([^|]*)\|", OPERATIONS, re.M)

    assert row is not None
    assert row[1].strip() == default_of(name)
    if range_of(name):
        assert row[2].strip() == range_of(name)


@pytest.mark.parametrize(("page", "name"), in_pages(rf"\b({PREFIX}[A-Z][A-Z_]+)\b"))
def test_a_setting_that_is_mentioned_exists(page: Path, name: str) -> None:
    """
    Every setting that a page mentions exists.
    """
    known = {PREFIX + field.upper() for field in DEFAULTS}

    assert name in known or NAMES_OF_TESTS_AND_TOOLS.fullmatch(name)


# The command line


@pytest.mark.parametrize(
    ("page", "line"),
    in_pages(r"(?:^|`)((?:asyncflow|bin/dev) [^\n`]*)"),
)
def test_a_command_that_is_mentioned_exists(page: Path, line: str) -> None:
    """
    Every command that a page mentions exists, with its options.
    """
    words = shlex.split(line.replace("bin/dev", "asyncflow dev"), comments=True)[1:]
    command = [word for word in words if re.fullmatch("[a-z]+", word)][:2]
    if command[:1] not in (["task"], ["queue"]):
        command = command[:1]
    shown = CliRunner().invoke(app, [*command, "--help"], prog_name="asyncflow")

    assert 0 == shown.exit_code
    for option in (word for word in words if word.startswith("--")):
        assert option in shown.output


def test_the_operators_page_names_every_option_and_no_other() -> None:
    """
    The page names every option of every command, and no other.
    """
    named = set(re.findall(r"`[^`\n]*?(--[a-z-]+)", OPERATIONS))

    assert set(options_of(app)) - {"--help"} == named


def options_of(command: Any) -> Iterator[str]:
    """
    The long options of a command and its subcommands, without hidden ones.
    """
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            yield from (name for name in parameter.opts if name.startswith("--"))
    for inner in getattr(command, "commands", {}).values():
        yield from options_of(inner)


# Log events


def test_the_list_of_log_events_is_true() -> None:
    """
    The list has every event with its level, and no other.
    """
    found: dict[str, set[str]] = {}
    for node in ast.walk(ast.parse(EVENTS.read_text())):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="log"), attr=level),
                args=[ast.Constant(value=str(event)), *_],
            ):
                found.setdefault(event, set()).add(level)
    listed = {
        event: set(levels.split(", "))
        for event, levels in re.findall(r"^\| `([a-z_.]+)` \| ([a-z, ]+) \|", OPERATIONS, re.M)
    }

    assert found == listed


# Code and links


@pytest.mark.parametrize(("page", "code"), in_pages(r"^```python\n(.*?)^```"))
def test_an_example_runs_and_its_handlers_can_be_loaded(
    page: Path, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Every Python example runs, and its handlers pass the worker's checks.
    """
    registry = Registry()
    monkeypatch.setattr("asyncflow.handlers.registry.DEFAULT_REGISTRY", registry)

    exec(compile(code, str(page), "exec", dont_inherit=True), {"__name__": f"example.{page.stem}"})

    for handler in registry:
        handler.check()
    assert len(registry) or "@asyncflow.handler" not in code


@pytest.mark.parametrize(("page", "line"), in_pages(r"^(curl -X POST(?:[^\n]*\\\n)*[^\n]*)$"))
def test_a_curl_line_submits_a_task(page: Path, line: str) -> None:
    """
    Every curl line has an address and a body that `asyncflow dev` accepts.
    """
    words = shlex.split(line)
    body = json.loads(words[words.index("-d") + 1])

    assert "http://127.0.0.1:3000/tasks" in words
    assert "Content-Type: application/json" in words
    SubmitTask.model_validate(body)


@pytest.mark.parametrize(("page", "target"), in_pages(r"\]\(([^)#:]+)(?:#[^)]*)?\)"))
def test_a_link_leads_somewhere(page: Path, target: str) -> None:
    """
    Every link to a file of the repository leads to one.
    """
    assert (page.parent / target).exists()


@pytest.mark.parametrize(("page", "name"), in_pages(r"`(\w+/test_\w+\.py::test_\w+)`"))
def test_a_guarantee_has_the_test_it_names(page: Path, name: str) -> None:
    """
    Every test that a page names exists.
    """
    path, _, function = name.partition("::")

    assert re.search(rf"def {function}\(", (ROOT / "tests" / path).read_text())


def test_every_guarantee_names_a_test() -> None:
    """
    Every section of the contract names a test, except the one that promises nothing.
    """
    sections = (ROOT / "docs" / "guarantees.md").read_text().split("\n## ")[1:]

    assert [] == [
        section.partition("\n")[0]
        for section in sections
        if "::test_" not in section and not section.startswith("Not promised")
    ]
