"""
How log lines look: readable on a terminal, one JSON object per line elsewhere.

Structlog draws the lines for terminals and takes those of handlers. JSON lines are made here:
a busy worker writes thousands of them a second, and a process that never needs structlog is
6 MB smaller.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NoReturn, TextIO

from asyncflow.telemetry.lines import Lines

Format = Literal["auto", "console", "json"]
Emit = Callable[[str, str, dict[str, Any]], None]
"""Takes an event's level, name and fields, which it may change."""

ENDS_MAX = 100
"""Different ends of lines to remember; the events of handlers may be of any number."""


def configure_logs(*, level: str, log_format: Format, process: str) -> None:
    """
    Set up logging for this process; lines go to standard error.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        log_format: `auto` is `console` when standard error is a terminal, else `json`.
        process: Which of AsyncFlow's processes this is; part of every line.
    """
    handler: logging.Handler
    if log_format == "console" or (log_format == "auto" and sys.stderr.isatty()):
        handler = _configure_console(level, process, sys.stderr)
        log.configure(level, emit=_through_structlog)
    else:
        lines = JsonLines(process, sys.stderr)
        handler = _Records(lines.emit)
        log.configure(level, emit=lines.emit, json_lines=lines)
    # Libraries (uvicorn, asyncio) speak through the standard module: same look, warnings up.
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)


class Log:
    """
    Takes the events of `telemetry.events`, and those of handlers through structlog.

    Until it is configured, in programs of others above all, structlog has them as it stands.
    """

    def __init__(self) -> None:
        self.configure("info", emit=_through_structlog)

    def configure(self, level: str, *, emit: Emit, json_lines: JsonLines | None = None) -> None:
        """
        Pass on what is at or above `level`.

        Args:
            emit: Takes it.
            json_lines: What `emit` writes, if that is JSON.
        """
        self._level = level
        self._threshold = logging.getLevelNamesMapping()[level.upper()]
        self._emit = emit
        self._is_structlog_adopted = False
        self.json_lines = json_lines

    @property
    def takes_info(self) -> bool:
        """
        Whether an INFO event would be written.
        """
        return self._threshold <= logging.INFO

    def info(self, event: str, **fields: Any) -> None:
        """
        An event that is as it should be.
        """
        if self._threshold <= logging.INFO:
            self._emit("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """
        An event that may concern a person.
        """
        if self._threshold <= logging.WARNING:
            self._emit("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """
        An event that a person must know; an exception as `exc_info` brings its traceback.
        """
        self._emit("error", event, fields)

    def structlog(self) -> Any:
        """
        A structlog logger whose lines are like all others of this process.
        """
        import structlog

        self.adopt_structlog()
        return structlog.get_logger()

    def adopt_structlog(self) -> None:
        """
        Take what is logged through structlog, unless somebody has configured it otherwise.
        """
        if self.json_lines is not None and not self._is_structlog_adopted:
            self._is_structlog_adopted = True
            _adopt_structlog(self._level, self.json_lines)


class JsonLines:
    """
    Writes an event as one line of JSON.
    """

    def __init__(self, process: str, stream: TextIO) -> None:
        self._process = process
        self._lines = Lines(stream)
        self._encode = json.JSONEncoder(default=repr).encode
        self._ends: dict[tuple[str, str], str] = {}

    def emit(
        self, level: str, event: str, fields: dict[str, Any], *, is_urgent: bool = False
    ) -> None:
        """
        Write it: by the end of this turn of the event loop if it is INFO and not urgent, else now.
        """
        error = fields.pop("exc_info", None)
        start = self._encode(fields)[:-1] + ", " if fields else "{"
        line = f"{start}{self._end(level, event)}"
        if error is not None:
            text = "".join(traceback.format_exception(error)).rstrip("\n")
            line += f', "exception": {self._encode(text)}'
        self._lines.write(line + "}", is_urgent=is_urgent or level != "info")

    def emit_encoded(self, event: str, fields: str) -> None:
        """
        Write an INFO event whose fields are JSON already: members of an object, at least one.
        """
        self._lines.write(f"{{{fields}, {self._end('info', event)}}}", is_urgent=False)

    def _end(self, level: str, event: str) -> str:
        # Encoding it for every line anew would be a third of the whole cost.
        end = self._ends.get((level, event))
        if end is None:
            end = self._encode({"event": event, "process": self._process, "level": level})[1:-1]
            if len(self._ends) < ENDS_MAX:
                self._ends[level, event] = end
        return f'{end}, "timestamp": "{_timestamp()}"'


def _timestamp() -> str:
    now = time.time()
    second = int(now)
    return f"{_second(second)}.{int((now - second) * 1e6):06}Z"


@lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class _Records(logging.Handler):
    """
    Passes the standard module's records on.
    """

    def __init__(self, emit: Emit) -> None:
        super().__init__()
        self._pass_on = emit

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {}
            if record.exc_info:
                fields["exc_info"] = record.exc_info[1]
            self._pass_on(record.levelname.lower(), record.getMessage(), fields)
        except Exception:
            self.handleError(record)


def _through_structlog(level: str, event: str, fields: dict[str, Any]) -> None:
    import structlog

    getattr(structlog.get_logger(), level)(event, **fields)


def _adopt_structlog(level: str, lines: JsonLines) -> None:
    """
    Make structlog pass its events on to `lines`.
    """
    import structlog

    if structlog.is_configured():
        return

    def pass_on(logger: Any, method: str, event: Any) -> NoReturn:
        fields = dict(structlog.processors.format_exc_info(logger, method, event))
        for ours in ("process", "timestamp"):
            fields.pop(ours, None)
        # At once: a handler may log what it does next because that may end the process.
        lines.emit(fields.pop("level"), fields.pop("event"), fields, is_urgent=True)
        raise structlog.DropEvent

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            pass_on,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )


def _configure_console(level: str, process: str, stream: TextIO) -> logging.Handler:
    import structlog

    def add_process(_: Any, __: str, event: Any) -> Any:
        event["logger"] = process  # The console shows it in front of the fields.
        return event

    shared: list[Any] = [
        # By a processor, since context variables do not reach other threads.
        add_process,
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
    ]
    render = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(),
        pad_event_to=24,
        sort_keys=False,
        # Not the default, which prints local variables: payloads are among them.
        exception_formatter=structlog.dev.plain_traceback,
    )
    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render],
            foreign_pre_chain=shared,
        )
    )
    return handler


log = Log()
