"""
Handler modules are loaded by name or path, or their author learns why not.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncflow.handlers import Handler, load_handlers

Load = Callable[..., str]

HANDLER = """
from asyncflow.handlers import handler
@handler("greet")
def greet(name: str): ...
"""

LOGGING = """
import structlog
from asyncflow.handlers import handler
log = structlog.get_logger()
@handler("mail")
def mail(): log.info("sent")
"""

SCRIPT = """
import sys
sys.path[:0] = {path!r}
from asyncflow.handlers import load_handlers
from asyncflow.errors import HandlerError
try:
    print(*load_handlers(sys.argv[1:]).names)
except HandlerError as error:
    print("HandlerError:", error)
"""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """
    Load modules in a fresh interpreter whose current folder is `tmp_path`.
    """

    def run(*modules: str) -> str:
        code = SCRIPT.format(path=[entry for entry in sys.path if entry])
        finished = subprocess.run(
            [sys.executable, "-P", "-c", code, *modules],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return finished.stdout.strip()

    return run


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_built_in_handler_is_always_there(load: Load) -> None:
    """
    A worker without modules can run `sample-task`.
    """
    assert "sample-task" == load()


def test_the_schema_of_the_built_in_handler_is_what_its_signature_says() -> None:
    """
    The hard-coded schema, which spares workers the import of Pydantic, equals the generated one.
    """
    sample = load_handlers([]).get("sample-task")
    assert sample is not None
    read = Handler(name="read", function=sample.function)

    assert sample.known_schema == read.payload_schema()
    assert sample.known_schema == sample.payload_schema()


def test_a_module_that_logs_through_structlog_logs_as_its_worker_does(tmp_path: Path) -> None:
    """
    A module's own structlog logger writes the worker's log format, without a logger from the
    context.
    """
    write(tmp_path, mail=LOGGING)
    code = f"""
import sys
sys.path[:0] = {[entry for entry in sys.path if entry]!r}
from asyncflow.handlers import load_handlers
from asyncflow.telemetry.logs import configure_logs
configure_logs(level="info", log_format="json", process="worker")
load_handlers(["mail"]).get("mail").function()
"""

    ended = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    line = json.loads(ended.stderr)
    assert ("sent", "worker", "info") == (line["event"], line["process"], line["level"])


@pytest.mark.parametrize("name", ["billing", "billing.py", "./billing.py"])
def test_a_module_loads_by_name_or_path(load: Load, tmp_path: Path, name: str) -> None:
    """
    A module in the current folder loads without being installed.
    """
    write(tmp_path, billing=HANDLER)

    assert "greet sample-task" == load(name)


def test_a_file_in_a_package_keeps_its_relative_imports(load: Load, tmp_path: Path) -> None:
    """
    A file in a package is imported under its dotted name, so its relative imports work.
    """
    (tmp_path / "src/shop").mkdir(parents=True)
    (tmp_path / "src/shop/__init__.py").touch()
    (tmp_path / "src/shop/names.py").write_text("NAME = 'greet'")
    (tmp_path / "src/shop/tasks.py").write_text(
        HANDLER.replace('"greet"', "NAME").replace("\nfrom", "from .names import NAME\nfrom", 1)
    )

    assert "greet sample-task" == load("src/shop/tasks.py")


def test_a_package_that_imports_its_handlers_counts(load: Load, tmp_path: Path) -> None:
    """
    A package counts as declaring the handlers of the modules that it imports.
    """
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/__init__.py").write_text("from . import tasks")
    (tmp_path / "shop/tasks.py").write_text(HANDLER)

    assert "greet sample-task" == load("shop")


def test_naming_a_module_twice_is_no_mistake(load: Load, tmp_path: Path) -> None:
    """
    A module may be named twice, by name or by path.
    """
    write(tmp_path, billing=HANDLER)

    assert "greet sample-task" == load("billing", "billing", "billing.py")


def test_a_missing_module_is_named_with_where_it_was_looked_for(load: Load, tmp_path: Path) -> None:
    """
    The error lists where the module was searched for: the commonest cause is the wrong current
    folder.
    """
    answer = load("billing.tasks")

    assert answer.startswith("HandlerError: No module named 'billing.tasks'. Searched in:")
    assert f"\n  {tmp_path}\n" in answer


def test_a_missing_file_is_named_in_full(load: Load, tmp_path: Path) -> None:
    """
    The error names the absolute path.
    """
    assert f"HandlerError: No such file: {tmp_path}/no/tasks.py." == load("no/tasks.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import surely_missing", "No module named 'surely_missing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_an_import_that_fails_shows_the_authors_own_traceback(
    load: Load, tmp_path: Path, text: str, expected: str
) -> None:
    """
    The traceback starts at the author's file, without frames of the import machinery.
    """
    write(tmp_path, billing=text)

    lines = load("billing").splitlines()

    assert "HandlerError: Module 'billing' failed while it was imported:" == lines[0]
    assert f'  File "{tmp_path}/billing.py", line 1' in lines[1] + lines[2]
    assert expected in "\n".join(lines)


def test_a_module_without_handlers_is_an_error(load: Load, tmp_path: Path) -> None:
    """
    A module without handlers is refused, because it is most likely the wrong one.
    """
    write(tmp_path, billing="def greet(): ...")

    assert "Module 'billing' declares no handler" in load("billing")


def test_a_file_may_have_a_name_that_another_module_has(load: Load, tmp_path: Path) -> None:
    """
    A file named like an existing module is imported under a name made from its path, and the other
    module keeps its own.
    """
    write(tmp_path, json=HANDLER + "import json; json.dumps(1)")

    assert "greet sample-task" == load("json.py")


def test_files_of_one_name_in_two_folders_load(load: Load, tmp_path: Path) -> None:
    """
    Files with the same name in two folders both load, by path or as `a.tasks` and `b.tasks`, even
    if named twice.
    """
    write(tmp_path, a__tasks=HANDLER, b__tasks=HANDLER.replace('"greet"', '"leave"'))

    assert "greet leave sample-task" == load("a/tasks.py", "b/tasks.py", "b/tasks.py")
    assert "greet leave sample-task" == load("a.tasks", "a/tasks.py", "b/tasks.py", "b.tasks")


def test_a_module_beside_the_handlers_does_not_replace_one_of_pythons_own(
    load: Load, tmp_path: Path
) -> None:
    """
    The standard library takes precedence over the folder of the handlers: an `email.py` there would
    otherwise break Pydantic and every library that sends mail.
    """
    write(
        tmp_path,
        email="raise RuntimeError('not the one that was meant')",
        billing="import email.message, pydantic" + HANDLER,
    )

    assert "greet sample-task" == load("billing")


def test_a_module_beside_the_handlers_wins_over_one_that_is_installed(
    load: Load, tmp_path: Path
) -> None:
    """
    The folder of the handlers takes precedence over installed packages: the author's `import yaml`
    means their own `yaml.py`.
    """
    write(tmp_path, pamqp="NAME = 'greet'")
    write(
        tmp_path,
        billing="from pamqp import NAME" + HANDLER.replace('"greet"', "NAME"),
    )

    assert "greet sample-task" == load("billing")


@pytest.mark.parametrize("name", ["test.tasks", "queue", "test/tasks.py", "queue.py"])
def test_modules_of_handlers_may_be_called_as_one_of_pythons_own(
    load: Load, tmp_path: Path, name: str
) -> None:
    """
    The modules that the operator names are searched for in the current folder first, even before
    the standard library.
    """
    write(tmp_path, test__tasks=HANDLER, queue=HANDLER)

    assert "greet sample-task" == load(name)


def test_a_signature_that_cannot_be_filled_is_reported_at_loading(
    load: Load, tmp_path: Path
) -> None:
    """
    The error comes at loading, not with the first task.
    """
    write(tmp_path, billing=HANDLER.replace("name: str", "*names"))

    assert f"'greet' (greet in {tmp_path}/billing.py, line 3): *names cannot be" in load("billing")


def test_a_type_json_cannot_fill_is_reported_at_loading(load: Load, tmp_path: Path) -> None:
    """
    The error is one line with the file, the function and the parameter.
    """
    write(tmp_path, billing="class Plain: ..." + HANDLER.replace("name: str", "a: int, b: Plain"))

    answer = load("billing")

    assert 1 == len(answer.splitlines())
    place = f"HandlerError: Handler 'greet' (greet in {tmp_path}/billing.py, line 3): "
    assert answer.startswith(f"{place}parameter 'b': no JSON becomes billing.Plain; use types")


def test_annotations_may_name_classes_from_further_down(load: Load, tmp_path: Path) -> None:
    """
    Annotations are resolved once the whole module is loaded.
    """
    later = (
        HANDLER.replace("name: str", "name: 'Name'") + "import enum\nclass Name(enum.Enum): ...\n"
    )
    write(tmp_path, billing=later)

    assert "greet sample-task" == load("billing")
