"""
AsyncFlow: durable distributed task processing on PostgreSQL, with RabbitMQ where one machine
is outgrown.

This page holds the names that code outside AsyncFlow may rely on; everything else may change.
They are imported when first used, so that a process pays only for what it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncflow.domain.retry import Backoff
    from asyncflow.errors import AsyncFlowError, Reject, Retry
    from asyncflow.handlers import Context, Progress, current_context, handler

    __version__: str

__all__ = [
    "AsyncFlowError",
    "Backoff",
    "Context",
    "Progress",
    "Reject",
    "Retry",
    "__version__",
    "current_context",
    "handler",
]

_HOMES = {
    "AsyncFlowError": "asyncflow.errors",
    "Backoff": "asyncflow.domain.retry",
    "Context": "asyncflow.handlers",
    "Progress": "asyncflow.handlers",
    "Reject": "asyncflow.errors",
    "Retry": "asyncflow.errors",
    "current_context": "asyncflow.handlers",
    "handler": "asyncflow.handlers",
}


def __getattr__(name: str) -> Any:
    value: Any
    if name == "__version__":
        from importlib.metadata import version

        value = version("asyncflow")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
