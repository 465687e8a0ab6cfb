"""
How a worker loads the modules that declare its handlers.

The names come from the operator, never from a task. A module is named as for `import`, or
as a path to its file; a file inside packages is imported under its dotted name, so relative
imports work. A file whose plain name another module has is imported under a name made of its
path. Errors speak to the author of the module: what is missing and where it was looked for,
or their own traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from asyncflow.errors import HandlerError
from asyncflow.handlers.registry import DEFAULT_REGISTRY, Registry
from asyncflow.telemetry.logs import log

BUILTIN_MODULE = "asyncflow.handlers.builtin"
_DECLARING: set[str] = set()
"""Modules whose import declared handlers, of functions of other modules perhaps."""

OF_PYTHON = sys.stdlib_module_names | {"test"}


def load_handlers(
    modules: Sequence[str], *, on_module: Callable[[str], object] = lambda name: None
) -> Registry:
    """
    Import `modules` and return the registry that their `@handler`s filled.

    Args:
        modules: Dotted names such as `billing.tasks`, looked up in the current folder
            first, or paths such as `billing/tasks.py`. The built-in handlers are
            always there.
        on_module: Called with each name before it is imported.

    Raises:
        HandlerError: If a module is missing, fails while it is imported, or declares no
            handler; or if a handler's parameters cannot be filled from a payload.
    """
    load_module(BUILTIN_MODULE)
    for name in modules:
        before = set(DEFAULT_REGISTRY.names)
        on_module(name)
        module = load_module(name)
        if before != set(DEFAULT_REGISTRY.names):
            _DECLARING.add(module.__name__)
        elif not _declares_handlers(module):
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
    importlib.invalidate_caches()
    if name.endswith(".py") or os.sep in name:
        module = _loaded_from(_existing(name))
    else:
        module = _named(name)
    if "structlog" in sys.modules:
        log.adopt_structlog()
    return module


def _named(name: str) -> ModuleType:
    _make_importable(os.getcwd())
    file = Path(f"{name.replace('.', os.sep)}.py").resolve()
    if name.partition(".")[0] in OF_PYTHON and file.is_file():
        return _loaded_from(file)  # importing it by name would find Python's own module
    return _already_loaded(file) or _imported(name)


def _existing(path: str) -> Path:
    file = Path(path).resolve()
    if not file.is_file():
        raise HandlerError(f"No such file: {file}.")
    return file


def _make_importable(folder: str) -> None:
    """
    Search `folder` after Python's own modules, so that an `email.py` in it replaces none of them,
    and before what is installed.
    """
    if folder in sys.path or (folder == os.getcwd() and "" in sys.path):
        return
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    own |= {os.path.join(each, "lib-dynload") for each in own}
    places = [sys.path.index(each) for each in own if each in sys.path]
    sys.path.insert(max(places, default=-1) + 1, folder)


def _loaded_from(file: Path) -> ModuleType:
    module = _already_loaded(file)
    if module is not None:
        return module
    folder, dotted = _located(file)
    _make_importable(folder)
    if "." not in dotted and _is_anothers(dotted, file):
        return _import_by_path(file)
    module = _imported(dotted)
    if module.__file__ is None or not file.samefile(module.__file__):
        raise HandlerError(
            f"{file} cannot be imported as {dotted!r}: that name belongs to "
            f"{module.__file__}. Rename its package."
        )
    return module


def _already_loaded(file: Path) -> ModuleType | None:
    modules = tuple(sys.modules.values())
    return next((m for m in modules if getattr(m, "__file__", None) == str(file)), None)


def _is_anothers(name: str, file: Path) -> bool:
    if name in sys.modules:
        return True
    spec = importlib.util.find_spec(name)
    return spec is not None and (spec.origin is None or Path(spec.origin).resolve() != file)


def _import_by_path(file: Path) -> ModuleType:
    # Under the shortest free name that begins with a folder: `b/tasks.py` is `b.tasks`.
    parts = [*file.parent.parts[1:], file.stem]
    names = [".".join(parts[-length:]) for length in range(2, len(parts) + 1)]
    dotted = next((name for name in names if name not in sys.modules), names[-1])
    spec = importlib.util.spec_from_file_location(dotted, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[dotted] = module
    try:
        spec.loader.exec_module(module)
    except HandlerError:
        raise
    except (Exception, SystemExit) as error:
        raise _import_failed(dotted, error) from error
    return module


def _located(file: Path) -> tuple[str, str]:
    """
    The folder to search and the dotted name under which `file` is imported.
    """
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
            raise HandlerError(f"No module named {dotted!r}. Searched in:\n  {places}") from error
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


def _declares_handlers(module: ModuleType) -> bool:
    functions = [handler.function for handler in DEFAULT_REGISTRY]
    return module.__name__ in _DECLARING or any(
        function.__module__ == module.__name__
        or function.__module__.startswith(f"{module.__name__}.")
        or any(value is function for value in vars(module).values())
        for function in functions
    )
