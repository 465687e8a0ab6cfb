"""
What users write: functions that run tasks, and what those functions may see and ask.
"""

from asyncflow.handlers.context import Context, Progress, current_context
from asyncflow.handlers.loading import load_handlers
from asyncflow.handlers.registry import DEFAULT_REGISTRY, Handler, Registry, handler

__all__ = [
    "DEFAULT_REGISTRY",
    "Context",
    "Handler",
    "Progress",
    "Registry",
    "current_context",
    "handler",
    "load_handlers",
]
