"""
The format of log lines: readable on a terminal, one JSON object per line elsewhere.

Structlog formats the lines for terminals, and handlers may log through it. JSON lines are
formatted here: a busy worker writes thousands of them per second, and a process that does not
import structlog is 6 MB smaller.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, NoReturn, TextIO

from asyncflow.telemetry.lines import Lines
from asyncflow.telemetry.streams import own_stream

Format = Literal["auto", "console", "json"]
Emit = Callable[[str, str, dict[str, Any]], None]
"""Takes an event's level, name and fields. It may change the fields."""

ENDS_MAX = 100
"""How many encoded line endings to cache; handlers may log any number of different events."""

QUIET = ("asyncio", "asyncpg", "alembic", "pamqp", "uvicorn")
"""Libraries that AsyncFlow itself uses; below WARNING they log nothing of use to operators."""

LEVELS = ("debug", "info", "warning", "error", "critical")
OURS = ("event", "exception", "level", "process", "timestamp")
"""The fields of every line. A handler's field with one of these names gets a `_` appended."""

PRINTED_LENGTH_MAX = 10_000
"""In characters. A longer text that stands for an unprintable value is cut."""


def configure_logs(*, level: str, log_format: Format, process: str) -> None:
    """
    Set up logging for this process; lines go to standard error.

    Records of the standard `logging` module, also those of libraries, become such lines. Logging
    never raises, whatever is logged and whatever happens to standard error.

    Args:
        level: `debug`, `info`, `warning` or `error`.
        log_format: `auto` is `console` when standard error is a terminal, else `json`.
        process: The kind of this process, such as `worker`; a field of every line.
    """
    is_console = log_format == "console" or (
        log_format == "auto" and sys.stderr is not None and sys.stderr.isatty()
    )
    if is_console:
        _configure_console(level, process, own_stream(sys.stderr, _lost_in_words))
        emit: Emit = _through_structlog
        log.configure(level, emit=emit)
    else:
        lines = JsonLines(process, sys.stderr)
        emit = lines.emit_now
        log.configure(level, emit=lines.emit, json_lines=lines)
    logging.basicConfig(handlers=[_Records(emit)], level=level.upper(), force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.root.level))


def take_fields_from(source: Callable[[], dict[str, Any]]) -> None:
    """
    Add the fields that `source` returns to every line; during an attempt these identify it.
    """
    global _fields_here  # noqa: PLW0603 - one source per process
    _fields_here = source


_fields_here: Callable[[], dict[str, Any]] = dict


class Log:
    """
    Receives the events of `telemetry.events`, and what handlers log through structlog.

    Until it is configured, for example in a program that embeds AsyncFlow, events go to structlog
    as configured there.
    """

    def __init__(self) -> None:
        self.configure("info", emit=_through_structlog)

    def configure(self, level: str, *, emit: Emit, json_lines: JsonLines | None = None) -> None:
        """
        Emit events at or above `level`.

        Args:
            json_lines: The writer behind `emit`, if it writes JSON.
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
        Log normal operation.
        """
        if self._threshold <= logging.INFO:
            self._emit("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """
        Log an event that may need attention.
        """
        if self._threshold <= logging.WARNING:
            self._emit("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """
        Log an event that needs attention; pass an exception as `exc_info` for its traceback.
        """
        self._emit("error", event, fields)

    def structlog(self) -> Any:
        """
        A structlog logger whose lines look like all others of this process.
        """
        import structlog

        self.adopt_structlog()
        return structlog.get_logger()

    def adopt_structlog(self) -> None:
        """
        Receive what is logged through structlog, unless a handler module has configured it.
        """
        if self.json_lines is not None and not self._is_structlog_adopted:
            self._is_structlog_adopted = True
            _adopt_structlog(self._level, self.json_lines)


class JsonLines:
    """
    Writes an event as one line of JSON; never raises.
    """

    def __init__(self, process: str, stream: TextIO) -> None:
        self._process = process
        self._lines = Lines(own_stream(stream, self._lost))
        self._encode = json.JSONEncoder(default=repr, allow_nan=False).encode
        self._ends: dict[tuple[str, str], str] = {}

    def emit(
        self, level: str, event: str, fields: dict[str, Any], *, is_urgent: bool = False
    ) -> None:
        """
        Write an event, immediately or, if it is INFO and not urgent, in this turn of the loop.
        """
        error = fields.pop("exc_info", None)
        try:
            start = self._encode(fields)[1:-1]
        except BaseException:
            # JSON cannot represent a key or value. Even printing one may raise anything, such as
            # KeyboardInterrupt, which must not fail the task.
            start = ", ".join(self._member(key, value) for key, value in fields.items())
        line = f"{{{start}, " if start else "{"
        line += self._end(level, event)
        if error is not None:
            line += f', "exception": {self._encode(_traceback(error))}'
        self._lines.write(line + "}", is_urgent=is_urgent or level != "info")

    def emit_now(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """
        Write an event immediately, because the next thing the caller does may end the process.
        """
        self.emit(level, event, fields, is_urgent=True)

    def emit_encoded(self, event: str, fields: str) -> None:
        """
        Write an INFO event whose fields are encoded already, as at least one member of an object.
        """
        self._lines.write(f"{{{fields}, {self._end('info', event)}}}", is_urgent=False)

    def _lost(self, count: int) -> str:
        return f'{{"count": {count}, {self._end("warning", "log.lost")}}}\n'

    def _member(self, key: Any, value: Any) -> str:
        try:
            text = self._encode(value)
        except BaseException:
            text = self._encode(printed(value))
        return f"{self._encode(printed(key))}: {text}"

    def _end(self, level: str, event: Any) -> str:
        # Encoding this for every line would be a third of the whole cost.
        end = self._ends.get((level, event)) if isinstance(event, str) else None
        if end is None:
            event = event if isinstance(event, str) else printed(event)
            end = self._encode({"event": event, "process": self._process, "level": level})[1:-1]
            if len(self._ends) < ENDS_MAX:
                self._ends[level, event] = end
        return f'{end}, "timestamp": "{_timestamp()}"'


def printed(value: Any) -> str:
    """
    `value` as text, even if printing it raises.
    """
    try:
        return (value if isinstance(value, str) else repr(value))[:PRINTED_LENGTH_MAX]
    except BaseException:
        return f"(a {type(value).__name__} that cannot be printed)"


def _traceback(error: Any) -> str:
    try:
        return "".join(traceback.format_exception(error)).rstrip("\n")
    except BaseException:
        return printed(error)


def _lost_in_words(count: int) -> str:
    return f"({count} writes to this log were lost: it was not read in time)\n"


def _timestamp() -> str:
    now = time.time()
    second = int(now)
    return f"{_second(second)}.{int((now - second) * 1e6):06}Z"


@lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class _Records(logging.Handler):
    """
    Emits records of the standard `logging` module, with their `extra` fields.
    """

    def __init__(self, emit: Emit) -> None:
        super().__init__()
        self._pass_on = emit

    def emit(self, record: logging.LogRecord) -> None:
        extra = {k: v for k, v in record.__dict__.items() if k not in RECORD_FIELDS}
        fields = {**_fields_here(), "logger": record.name, **_renamed(extra)}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exc_info"] = record.exc_info[1]
        if record.stack_info:
            fields["stack"] = record.stack_info
        try:
            event = record.getMessage()
        except BaseException:  # arguments that do not match the message, or cannot be printed
            event = f"{printed(record.msg)} {printed(record.args)}"
        level = LEVELS[min(max(record.levelno, logging.DEBUG), logging.CRITICAL) // 10 - 1]
        with contextlib.suppress(Exception):  # structlog may be configured by a handler module
            self._pass_on(level, event, fields)


RECORD_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def _renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}_" if name in OURS else name: value for name, value in fields.items()}


def _through_structlog(level: str, event: str, fields: dict[str, Any]) -> None:
    import structlog

    getattr(structlog.get_logger(), level)(event, **fields)


def _add_fields_here(_: Any, __: str, event: Any) -> Any:
    return {**_fields_here(), **event}


def _adopt_structlog(level: str, lines: JsonLines) -> None:
    """
    Make structlog pass its events on to `lines`.
    """
    import structlog

    if structlog.is_configured():
        return

    def pass_on(_: Any, method: str, event: Any) -> NoReturn:
        name = event.pop("event", "")
        error = _error_of(event.pop("exc_info", None))
        fields = _renamed(event) if error is None else {**_renamed(event), "exc_info": error}
        lines.emit_now(method, name, fields)
        raise structlog.DropEvent

    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, _add_fields_here, pass_on],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )


def _error_of(exc_info: Any) -> BaseException | None:
    if isinstance(exc_info, tuple):
        exc_info = exc_info[1]
    if isinstance(exc_info, BaseException):
        return exc_info
    return sys.exc_info()[1] if exc_info else None


def _configure_console(level: str, process: str, stream: TextIO) -> None:
    import structlog

    def add_process(_: Any, __: str, event: Any) -> Any:
        # Shown in front of the fields. A processor adds it, because context variables do not reach
        # other threads.
        logger = event.get("logger")
        event["logger"] = f"{process} {logger}" if logger else process
        return event

    render = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(),
        pad_event_to=24,
        sort_keys=False,
        # Not the default, which prints local variables, payloads among them.
        exception_formatter=structlog.dev.plain_traceback,
    )

    lines = Lines(stream)

    def write(logger: Any, method: str, event: Any) -> NoReturn:
        try:
            text = render(logger, method, dict(event))
        except BaseException:
            # A value, a key or an error that cannot be printed.
            fields = {printed(key): printed(value) for key, value in event.items()}
            text = render(logger, method, fields)
        lines.write(str(text), is_urgent=True)
        raise structlog.DropEvent

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _add_fields_here,
            add_process,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            write,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=True,
    )


log = Log()
