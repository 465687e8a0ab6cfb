"""
How a worker loads the modules that declare its handlers.

The names come from the operator, never from a task. A module is named as for `import`, or
as a path to its file; a file inside packages is imported under its dotted name, so relative
imports work. Errors speak to the author of the module: what is missing and where it was
looked for, or their own traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from asyncflow.errors import HandlerError
from asyncflow.handlers.registry import DEFAULT_REGISTRY, Registry
from asyncflow.telemetry.logs import log

BUILTIN_MODULE = "asyncflow.handlers.builtin"


def load_handlers(modules: Sequence[str]) -> Registry:
    """
    Import `modules` and return the registry that their `@handler`s filled.

    Args:
        modules: Dotted names such as `billing.tasks`, looked up in the current folder
            first, or paths such as `billing/tasks.py`. The built-in handlers are
            always there.

    Raises:
        HandlerError: If a module is missing, fails while it is imported, or declares no
            handler; or if a handler's parameters cannot be filled from a payload.
    """
    load_module(BUILTIN_MODULE)
    for name in modules:
        before = set(DEFAULT_REGISTRY.names)
        module = load_module(name)
        if before == set(DEFAULT_REGISTRY.names) and not _declares_handlers(module):
            raise HandlerError(
                f"Module {name!r} declares no handler. Decorate its functions with "
                "@asyncflow.handler, or name the module that does."
            )
    for handler in DEFAULT_REGISTRY:
        handler.check()
    return DEFAULT_REGISTRY


def load_module(name: str) -> ModuleType:
    """
    Import one module by dotted name or by the path of its file.

    Raises:
        HandlerError: If it is missing or fails while it is imported.
    """
    if name.endswith(".py") or os.sep in name:
        folder, dotted = _located(name)
    else:
        folder, dotted = os.getcwd(), name
    if folder not in sys.path and not (folder == os.getcwd() and "" in sys.path):
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    module = _imported(dotted)
    _check_is_the_file(module, name)
    if "structlog" in sys.modules:
        log.adopt_structlog()
    return module


def _located(path: str) -> tuple[str, str]:
    """
    The folder to search and the dotted name under which `path` is imported.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise HandlerError(f"There is no file {file}.")
    parts = [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    if parts[-1] == "__init__":
        parts.pop()
    return str(folder), ".".join(parts)


def _imported(dotted: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{dotted}.".startswith(f"{error.name}."):
            places = "\n  ".join(place or os.getcwd() for place in sys.path)
            raise HandlerError(f"There is no module {dotted!r}. Looked in:\n  {places}") from error
        raise _import_failed(dotted, error) from error
    except HandlerError:
        raise
    except (Exception, SystemExit) as error:
        raise _import_failed(dotted, error) from error


def _import_failed(dotted: str, error: BaseException) -> HandlerError:
    frame = error.__traceback__
    while frame is not None and _is_machinery(frame.tb_frame.f_code.co_filename):
        frame = frame.tb_next
    lines = traceback.format_exception(type(error), error, frame)
    return HandlerError(f"Module {dotted!r} failed while it was imported:\n{''.join(lines)}")


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")


def _check_is_the_file(module: ModuleType, name: str) -> None:
    if not name.endswith(".py") or module.__file__ is None:
        return
    if not Path(name).resolve().samefile(module.__file__):
        raise HandlerError(
            f"{name} cannot be imported as {module.__name__!r}: that name belongs to "
            f"{module.__file__}. Rename the file."
        )


def _declares_handlers(module: ModuleType) -> bool:
    functions = [handler.function for handler in DEFAULT_REGISTRY]
    return any(
        function.__module__ == module.__name__
        or function.__module__.startswith(f"{module.__name__}.")
        or any(value is function for value in vars(module).values())
        for function in functions
    )
