"""
How functions become handlers, and where they are found by name.

A task names its handler; a worker runs it only if the name is in its registry. Nothing is
ever imported because a task says so: modules come from the worker's own settings, see
`load_handlers`. How a payload becomes arguments lives in `handlers/arguments`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar, overload

from asyncflow.domain.policy import DEFAULT_POLICY, NAME_PATTERN, Policy
from asyncflow.domain.retry import Backoff
from asyncflow.errors import HandlerError
from asyncflow.handlers.arguments import Arguments, declaration_error, place_of, read_signature
from asyncflow.handlers.context import Context

IsolationKind = Literal["loop", "thread", "process"]
ExtraKeys = Literal["forbid", "ignore"]
InvalidPayloads = Literal["fail", "retry"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Handler:
    """
    A function that runs the tasks of one name, and how it wants them run.

    Attributes:
        name: What tasks call it.
        function: The function itself, as written.
        policy: Queue, attempts, timeout and backoff of tasks that do not say otherwise.
        isolation: `loop` awaits it among the worker's own coroutines, `thread` calls it in
            a thread, `process` runs it in a child process that can be killed.
        never_retry: Exceptions that fail a task without a retry.
        memory_bytes_max: What the child process and its own children may hold together;
            None means no limit. Only with `process`.
        known_schema: What `payload_schema` answers; None means that the signature says it.
        extra: What keys that no parameter names come to: `forbid` or `ignore`.
        invalid_payload: Whether a payload that does not fit fails its task for good (`fail`) or
            is tried again (`retry`).
    """

    name: str
    function: Callable[..., Any]
    policy: Policy = DEFAULT_POLICY
    isolation: IsolationKind = "loop"
    never_retry: tuple[type[BaseException], ...] = ()
    memory_bytes_max: int | None = None
    known_schema: dict[str, Any] | None = None
    extra: ExtraKeys = "forbid"
    invalid_payload: InvalidPayloads = "fail"
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_async", inspect.iscoroutinefunction(self.function))
        for fault in _faults(self):
            raise declaration_error(self.name, self.function, fault)

    def bind(self, payload: str) -> dict[str, Any]:
        """
        The keyword arguments that `payload`, JSON text, stands for.

        Raises:
            InvalidPayload: If the handler does not take it: every fault and where it is.
        """
        return self._signature[0].bind(payload)

    def arguments(self, payload: str, context: Context) -> dict[str, Any]:
        """
        `bind`, and the context under the parameter that asks for it.
        """
        takes, context_parameter = self._signature
        arguments = takes.bind(payload)
        if context_parameter is not None:
            arguments[context_parameter] = context
        return arguments

    def payload_schema(self) -> dict[str, Any]:
        """
        The JSON Schema (draft 2020-12) of the payloads this handler takes.

        `bind` takes what the schema allows, and a little more: the conversions of
        Pydantic's lax mode, such as "5" for a number.

        Raises:
            HandlerError: If a parameter's type has no JSON form.
        """
        return self.known_schema or self._signature[0].schema()

    def check(self) -> None:
        """
        Read the signature and the types in it now, rather than when the first task comes.

        Raises:
            HandlerError: If a payload cannot be turned into the function's arguments.
        """
        _ = self._signature
        self.payload_schema()

    @cached_property
    def _signature(self) -> tuple[Arguments, str | None]:
        # Not at decoration: annotations may name classes that the module defines further down.
        return read_signature(self.name, self.function, ignores_extra=self.extra == "ignore")


class Registry:
    """
    Handlers by name; no two share one.
    """

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def add(self, handler: Handler) -> None:
        """
        Take `handler` in.

        Raises:
            HandlerError: If another function has its name.
        """
        other = self._handlers.get(handler.name)
        if other is not None and other.function is not handler.function:
            raise HandlerError(
                f"Two handlers are called {handler.name!r}: {place_of(other.function)} and "
                f"{place_of(handler.function)}. Give one of them another name."
            )
        self._handlers[handler.name] = handler

    def get(self, name: str) -> Handler | None:
        """
        The handler of this name, or None.
        """
        return self._handlers.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """
        The names of all handlers, sorted.
        """
        return tuple(sorted(self._handlers))

    @property
    def queues(self) -> tuple[str, ...]:
        """
        The queues that the handlers want their tasks to wait in, sorted.
        """
        return tuple(sorted({handler.policy.queue for handler in self}))

    def __iter__(self) -> Iterator[Handler]:
        return iter(tuple(self._handlers.values()))

    def __len__(self) -> int:
        return len(self._handlers)


DEFAULT_REGISTRY = Registry()
"""Where `@handler` puts handlers unless told otherwise."""


@overload
def handler(function: Function, /) -> Function: ...


@overload
def handler(
    name: str | None = None,
    /,
    *,
    queue: str = "default",
    max_attempts: int = 5,
    timeout_seconds: float = 900.0,
    backoff: Backoff | None = None,
    never_retry: tuple[type[BaseException], ...] = (),
    isolation: IsolationKind | None = None,
    memory_bytes_max: int | None = None,
    extra: ExtraKeys = "forbid",
    invalid_payload: InvalidPayloads = "fail",
    registry: Registry | None = None,
) -> Callable[[Function], Function]: ...


def handler(
    name_or_function: str | Callable[..., Any] | None = None,
    /,
    *,
    queue: str = "default",
    max_attempts: int = 5,
    timeout_seconds: float = 900.0,
    backoff: Backoff | None = None,
    never_retry: tuple[type[BaseException], ...] = (),
    isolation: IsolationKind | None = None,
    memory_bytes_max: int | None = None,
    extra: ExtraKeys = "forbid",
    invalid_payload: InvalidPayloads = "fail",
    registry: Registry | None = None,
) -> Any:
    """
    Let a function run the tasks of one name; the function itself stays as it was.

    ```python
    @handler
    async def send_invoice(order_id: UUID, copies: int = 1) -> dict[str, str]: ...

    @handler("transcode.video", isolation="process", memory_bytes_max=2 << 30)
    def transcode(payload: Video, context: Context) -> Transcoded: ...
    ```

    Args:
        name_or_function: What tasks call it: 1 to 128 of `A-Z a-z 0-9 . _ -`. Left out, the
            function's name with hyphens for underscores: `send_invoice` is `send-invoice`.
        queue: Where its tasks wait, unless their submitter says otherwise.
        max_attempts: How many failed attempts end a task, 1 to 1000.
        timeout_seconds: How long one attempt may take, up to 7 days.
        backoff: The waits between attempts; None means `Backoff()`.
        never_retry: Exceptions that fail a task without a retry, whatever attempts are left.
        isolation: `loop` (only `async def`), `thread` (only `def`) or `process` (both).
            None means `loop` for `async def` and `thread` for `def`.
        memory_bytes_max: Most resident memory of the handler's process and its children;
            more ends the attempt. Only with `process`; None means no limit.
        extra: `forbid` refuses payloads with keys that no parameter names; `ignore` drops those
            keys. A type of the whole payload decides that for itself.
        invalid_payload: `fail` makes a task whose payload does not fit a dead letter; `retry`
            tries it again like any failure, so that a newer worker may take it.
        registry: Where to put it; None means the registry that workers load.

    Raises:
        HandlerError: If the declaration contradicts itself, or the name is taken.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        name = name_or_function if isinstance(name_or_function, str) else _default_name(function)
        try:
            policy = Policy(queue, max_attempts, timeout_seconds, backoff or Backoff())
        except ValueError as error:
            raise declaration_error(name, function, str(error)) from error
        default = "loop" if inspect.iscoroutinefunction(function) else "thread"
        declared = Handler(
            name=name,
            function=function,
            policy=policy,
            isolation=isolation or default,  # type: ignore[arg-type]
            never_retry=never_retry,
            memory_bytes_max=memory_bytes_max,
            extra=extra,
            invalid_payload=invalid_payload,
        )
        (DEFAULT_REGISTRY if registry is None else registry).add(declared)
        return function

    if name_or_function is None or isinstance(name_or_function, str):
        return declare
    return declare(name_or_function)


def _default_name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", repr(function))).replace("_", "-")


def _faults(handler: Handler) -> Iterator[str]:
    function, isolation = handler.function, handler.isolation
    if not NAME_PATTERN.fullmatch(handler.name):
        yield "use 1 to 128 of A-Z a-z 0-9 . _ - for its name."
    if not inspect.isroutine(function):
        yield (
            f"only functions can be handlers, and this is a {type(function).__qualname__}; "
            "call it from a `def` or `async def`."
        )
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        yield "it contains `yield`; a handler returns its result once."
    if isolation not in ("loop", "thread", "process"):
        yield f"isolation={isolation!r} is none of 'loop', 'thread', 'process'."
    if isolation == "loop" and not handler.is_async:
        yield (
            "isolation='loop' needs `async def`; a `def` would block every other task of the "
            "worker. Use 'thread' or 'process'."
        )
    if isolation == "thread" and handler.is_async:
        yield "isolation='thread' needs `def`; for `async def` use 'loop' or 'process'."
    limit = handler.memory_bytes_max
    if limit is not None and isolation != "process":
        yield "memory_bytes_max needs isolation='process'; threads share the worker's memory."
    if limit is not None and limit < 1 << 20:
        yield f"memory_bytes_max={limit}: it must be at least 1048576 (1 MiB)."
    if handler.extra not in ("forbid", "ignore"):
        yield f"extra={handler.extra!r} is neither 'forbid' nor 'ignore'."
    if handler.invalid_payload not in ("fail", "retry"):
        yield f"invalid_payload={handler.invalid_payload!r} is neither 'fail' nor 'retry'."
    if not _are_exceptions(handler.never_retry):
        yield "never_retry must be a tuple of exception classes."


def _are_exceptions(classes: Any) -> bool:
    return isinstance(classes, tuple) and all(
        isinstance(each, type) and issubclass(each, BaseException) for each in classes
    )
