"""
How a task's payload becomes a handler's arguments.

A handler's signature is its contract. Three shapes:

- every parameter is one key of the payload: ``def charge(order_id: UUID, cents: int = 0)``;
  ``**rest`` takes the keys that no parameter names, and without it an unknown key is a fault;
- a single parameter named ``payload`` takes the whole object: a mapping, a Pydantic model, a
  dataclass or a TypedDict;
- nothing: the payload must be empty.

In each, a parameter annotated `Context` receives the context, whatever its name.

Pydantic validates, with its rules for JSON: what JSON can't say (dates, UUIDs, decimals)
is read from strings, and "5" passes for an int. Importing it costs a process 100 ms and
12 MB, so handlers that take the bare object, ``**kwargs`` or nothing run without it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from typing import Any, NotRequired, Protocol, Required

from asyncflow.errors import Fault, HandlerError, InvalidPayload
from asyncflow.handlers.context import Context

if typing.TYPE_CHECKING:
    from pydantic import TypeAdapter

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Arguments(Protocol):
    """
    One shape of payload.
    """

    def bind(self, payload: str) -> dict[str, Any]:
        """
        The keyword arguments that `payload`, JSON text, stands for.

        Raises:
            InvalidPayload: With every fault and where it is.
        """

    def schema(self) -> dict[str, Any]:
        """
        The JSON Schema of the payloads that `bind` takes.
        """


def read_signature(name: str, function: Callable[..., Any]) -> tuple[Arguments, str | None]:
    """
    Read how `function` wants its payload and under which parameter it wants the context.

    Raises:
        HandlerError: If a JSON object cannot be turned into its arguments.
    """
    parameters = _parameters(name, function)
    contexts = [p.name for p in parameters if _is_context(p.annotation)]
    if len(contexts) > 1:
        raise HandlerError(f"Handler {name!r} has two Context parameters: {', '.join(contexts)}.")
    context_parameter = contexts[0] if contexts else None
    fields = [p for p in parameters if p.name != context_parameter]
    return _arguments(name, fields), context_parameter


def _arguments(name: str, fields: list[inspect.Parameter]) -> Arguments:
    if not fields:
        return NoArguments(name)
    if len(fields) > 1:
        return Fields(name, fields)
    (only,) = fields
    is_rest = only.kind is inspect.Parameter.VAR_KEYWORD
    if is_rest and only.annotation in (inspect.Parameter.empty, Any, object):
        return BareObject(name, None)
    if only.name == "payload" and not is_rest and _is_bare_mapping(only.annotation):
        return BareObject(name, "payload")
    if only.name == "payload" and not is_rest and _is_object_type(only.annotation):
        return WholePayload(name, only.annotation)
    return Fields(name, fields)


class NoArguments:
    """
    The handler takes nothing, so the payload must be empty.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def bind(self, payload: str) -> dict[str, Any]:
        if payload == "{}":
            return {}
        keys = _json_object(self._name, payload)
        if keys:
            faults = [Fault(_pointer(key), "Unknown key; the handler takes none.") for key in keys]
            raise InvalidPayload(self._name, faults)
        return {}

    def schema(self) -> dict[str, Any]:
        return {"$schema": DIALECT, "type": "object", "additionalProperties": False}


class BareObject:
    """
    The handler takes any object as it is: as `payload`, or spread over `**kwargs`.
    """

    def __init__(self, name: str, parameter: str | None) -> None:
        self._name = name
        self._parameter = parameter

    def bind(self, payload: str) -> dict[str, Any]:
        whole = _json_object(self._name, payload)
        return whole if self._parameter is None else {self._parameter: whole}

    def schema(self) -> dict[str, Any]:
        return {"$schema": DIALECT, "type": "object"}


class WholePayload:
    """
    The handler takes the payload as one typed object.

    Whether unknown keys pass is the type's own choice; Pydantic's default ignores them.
    """

    def __init__(self, name: str, annotation: Any) -> None:
        self._name = name
        self._annotation = annotation
        self._adapter: TypeAdapter[Any] | None = None

    def bind(self, payload: str) -> dict[str, Any]:
        return {"payload": _validated(self._name, self._prepared(), payload, takes=())}

    def schema(self) -> dict[str, Any]:
        return _schema(self._name, self._prepared())

    def _prepared(self) -> TypeAdapter[Any]:
        if self._adapter is None:
            self._adapter = _adapter(self._name, self._annotation)
        return self._adapter


class Fields:
    """
    The handler takes the payload's keys as its parameters.

    A parameter that the payload leaves out keeps the default of the function itself.
    """

    def __init__(self, name: str, fields: list[inspect.Parameter]) -> None:
        self._name = name
        self._fields = [f for f in fields if f.kind is not inspect.Parameter.VAR_KEYWORD]
        self._rest = next((f for f in fields if f.kind is inspect.Parameter.VAR_KEYWORD), None)
        self._takes = tuple(f.name for f in self._fields)
        self._adapter: TypeAdapter[Any] | None = None

    def bind(self, payload: str) -> dict[str, Any]:
        arguments: dict[str, Any] = _validated(
            self._name, self._prepared(), payload, takes=self._takes
        )
        return arguments

    def schema(self) -> dict[str, Any]:
        schema = _schema(self._name, self._prepared())
        for field in self._fields:
            default = _json_default(field.default)
            if default is not None:
                schema["properties"][field.name].update(default)
        return schema

    def _prepared(self) -> TypeAdapter[Any]:
        if self._adapter is None:
            self._adapter = _adapter(self._name, self._payload_type())
        return self._adapter

    def _payload_type(self) -> Any:
        # A TypedDict rather than a model: its keys may have any name, keys left out stay out, and
        # what validation returns is the keyword arguments themselves.
        from pydantic import ConfigDict, with_config
        from typing_extensions import TypedDict

        keys: dict[str, Any] = {}
        for field in self._fields:
            annotation = _or_any(field.annotation)
            optional = field.default is not inspect.Parameter.empty
            keys[field.name] = NotRequired[annotation] if optional else Required[annotation]
        if self._rest is None:
            closed = TypedDict("Payload", keys)  # type: ignore[misc]
            return with_config(ConfigDict(extra="forbid"))(closed)
        rest = _or_any(self._rest.annotation)
        opened = TypedDict("Payload", keys, extra_items=rest)  # type: ignore[misc]
        return with_config(ConfigDict(extra="allow"))(opened)


def _parameters(name: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(function)
        parameters = [_resolved(parameter, function) for parameter in signature.parameters.values()]
    except NameError as error:
        raise HandlerError(
            f"Handler {name!r}: an annotation cannot be resolved ({error}). Its names must exist "
            "in the module at run time; an import under TYPE_CHECKING is not enough."
        ) from error
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise HandlerError(
                f"Handler {name!r}: parameter {parameter.name!r} is positional-only; "
                "a payload's keys are passed by name."
            )
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            raise HandlerError(
                f"Handler {name!r}: *{parameter.name} cannot be filled from an object; "
                "use **kwargs or a list parameter."
            )
        if type(parameter.default).__name__ == "FieldInfo":
            raise HandlerError(
                f"Handler {name!r}: parameter {parameter.name!r} has a Field(...) as its default; "
                "write Annotated[..., Field(...)] and a plain default."
            )
    return parameters


def _resolved(parameter: inspect.Parameter, function: Callable[..., Any]) -> inspect.Parameter:
    if parameter.annotation is inspect.Parameter.empty:
        return parameter

    class Holder:
        __annotations__ = {parameter.name: parameter.annotation}

    names = getattr(inspect.unwrap(function), "__globals__", {})
    hints = typing.get_type_hints(Holder, globalns=names, localns={}, include_extras=True)
    return parameter.replace(annotation=hints[parameter.name])


def _is_context(annotation: Any) -> bool:
    return bool(annotation is Context or annotation == Context | None)


def _is_bare_mapping(annotation: Any) -> bool:
    if annotation in (inspect.Parameter.empty, Any):
        return True
    base = typing.get_origin(annotation) or annotation
    return base in (dict, Mapping) and typing.get_args(annotation) in (
        (),
        (str, Any),
        (str, object),
    )


def _is_object_type(annotation: Any) -> bool:
    base = typing.get_origin(annotation) or annotation
    if base is typing.Annotated:
        return _is_object_type(typing.get_args(annotation)[0])
    return isinstance(base, type) and (
        issubclass(base, Mapping)
        or dataclasses.is_dataclass(base)
        or hasattr(base, "__pydantic_validator__")  # a model, recognised without the import
        or hasattr(base, "__required_keys__")  # a TypedDict, of typing or typing_extensions
    )


def _or_any(annotation: Any) -> Any:
    return Any if annotation is inspect.Parameter.empty else annotation


def _adapter(name: str, annotation: Any) -> TypeAdapter[Any]:
    from pydantic import PydanticUserError, TypeAdapter

    try:
        return TypeAdapter(annotation)
    except (PydanticUserError, NameError, TypeError) as error:
        fact = str(error).split("\n\n")[0].strip()
        raise HandlerError(f"Handler {name!r}: its parameters cannot be read: {fact}") from error


def _schema(name: str, adapter: TypeAdapter[Any]) -> dict[str, Any]:
    from pydantic import PydanticUserError

    try:
        return {"$schema": DIALECT, **adapter.json_schema()}
    except PydanticUserError as error:
        fact = str(error).split("\n\n")[0].strip()
        raise HandlerError(f"Handler {name!r}: no JSON Schema can be made: {fact}") from error


def _validated(
    name: str, adapter: TypeAdapter[Any], payload: str, *, takes: tuple[str, ...]
) -> Any:
    from pydantic import ValidationError

    try:
        return adapter.validate_json(payload)
    except ValidationError as invalid:
        whole = _json_object(name, payload)
        faults = []
        for error in invalid.errors(include_url=False, include_input=False):
            detail = error["msg"]
            if error["type"] == "extra_forbidden":
                detail = "Unknown key" + (
                    f"; the handler takes {', '.join(takes)}." if takes else "."
                )
            path = _path(whole, error["loc"], is_missing=error["type"] == "missing")
            faults.append(Fault(_pointer(*path), detail))
        # The faults quote no input: payloads may hold secrets, and failures are shown widely.
        raise InvalidPayload(name, faults) from None


def _json_object(name: str, payload: str) -> dict[str, Any]:
    try:
        whole = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(name, [Fault("", f"The payload is no JSON: {error}")]) from None
    if not isinstance(whole, dict):
        raise InvalidPayload(name, [Fault("", "The payload must be a JSON object.")])
    return whole


def _path(whole: Any, location: tuple[int | str, ...], *, is_missing: bool) -> list[int | str]:
    """
    The part of Pydantic's location that leads through the document.

    Locations also name branches of unions and validators, which no document contains. The
    last step to what is missing is not in this document either, but belongs there.
    """
    path: list[int | str] = []
    place = whole
    for index, step in enumerate(location):
        belongs = is_missing and index == len(location) - 1
        if isinstance(place, dict) and isinstance(step, str) and (step in place or belongs):
            path.append(step)
            place = place.get(step)
        elif isinstance(place, list) and isinstance(step, int) and step < len(place):
            path.append(step)
            place = place[step]
    return path


def _pointer(*path: int | str) -> str:
    return "".join("/" + str(step).replace("~", "~0").replace("/", "~1") for step in path)


def _json_default(default: Any) -> dict[str, Any] | None:
    if default is inspect.Parameter.empty:
        return None
    from pydantic_core import to_jsonable_python

    try:
        value = to_jsonable_python(default)
        json.dumps(value, allow_nan=False)
    except Exception:
        return None  # a sentinel of the author's: it has no place in a schema
    return {"default": value}
