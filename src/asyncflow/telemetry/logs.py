"""
How log lines look: readable on a terminal, one JSON object per line elsewhere.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Literal

import structlog

Format = Literal["auto", "console", "json"]


def configure_logs(*, level: str, log_format: Format, process: str) -> None:
    """
    Set up logging for this process; lines go to standard error.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        log_format: `auto` is `console` when standard error is a terminal, else `json`.
        process: Which of AsyncFlow's processes this is; part of every line.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        # By a processor, since context variables do not reach other threads. The console
        # shows `logger` in front of the fields.
        _adding("logger" if console else "process", process),
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if console else "iso", utc=not console),
        structlog.processors.format_exc_info,
    ]
    if console:
        render: Any = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_event_to=24,
            sort_keys=False,
            # Not the default, which prints local variables: payloads are among them.
            exception_formatter=structlog.dev.plain_traceback,
        )
        shared.pop()
    else:
        render = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries (uvicorn, asyncio) speak through the standard module: same look, warnings up.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


def _adding(key: str, value: str) -> Callable[..., MutableMapping[str, Any]]:
    def add(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event[key] = value
        return event

    return add
