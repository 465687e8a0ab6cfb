"""
How a task's payload becomes a handler's arguments.

A handler's signature is its contract. Three shapes:

- every parameter is one key of the payload: ``def charge(order_id: UUID, cents: int = 0)``;
  ``**rest`` takes the keys that no parameter names, and without it an unknown key is a fault;
- a single parameter named ``payload`` takes the whole object: a mapping, a Pydantic model, a
  dataclass or a TypedDict;
- nothing: the payload must be empty.

With ``extra="ignore"`` keys that no parameter names are dropped instead of refused.

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
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, NotRequired, Protocol, Required

from asyncflow.errors import FieldError, HandlerError, InvalidPayload
from asyncflow.handlers.context import Context
from asyncflow.jsontext import pointer_to

if typing.TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter

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


def read_signature(
    name: str, function: Callable[..., Any], *, ignores_extra: bool = False
) -> tuple[Arguments, str | None]:
    """
    Read how `function` wants its payload and under which parameter it wants the context.

    Args:
        ignores_extra: Drop keys that no parameter names instead of refusing them.

    Raises:
        HandlerError: If a JSON object cannot be turned into its arguments.
    """
    parameters = _parameters(name, function)
    contexts = [p.name for p in parameters if _is_context(p.annotation)]
    if len(contexts) > 1:
        fact = f"two parameters are annotated Context: {', '.join(contexts)}."
        raise declaration_error(name, function, fact)
    context_parameter = contexts[0] if contexts else None
    fields = [p for p in parameters if p.name != context_parameter]
    return _arguments(Subject(name, function, ignores_extra), fields), context_parameter


def declaration_error(name: str, function: Callable[..., Any], fact: str) -> HandlerError:
    """
    The error of a handler that is declared wrongly: which one, where, and `fact`.
    """
    return HandlerError(f"Handler {name!r} ({place_of(function)}): {fact}")


def place_of(function: Callable[..., Any]) -> str:
    """
    A function's name and where its source is, for its author.
    """
    inner = inspect.unwrap(function)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    code = getattr(inner, "__code__", None)
    if code is None:
        return f"{name} in module {getattr(inner, '__module__', None)}"
    return f"{name} in {code.co_filename}, line {code.co_firstlineno}"


class Subject(NamedTuple):
    """
    Whose arguments they are.

    Attributes:
        name: The handler's.
        ignores_extra: Whether keys that no parameter names are dropped instead of refused.
    """

    name: str
    function: Callable[..., Any]
    ignores_extra: bool


def _arguments(handler: Subject, fields: list[inspect.Parameter]) -> Arguments:
    name = handler.name
    if not fields:
        return NoArguments(handler)
    if len(fields) > 1:
        return Fields(handler, fields)
    (only,) = fields
    is_rest = only.kind is inspect.Parameter.VAR_KEYWORD
    if is_rest and only.annotation in (inspect.Parameter.empty, Any, object):
        return BareObject(name, None)
    if only.name == "payload" and not is_rest and _is_bare_mapping(only.annotation):
        return BareObject(name, "payload")
    if only.name == "payload" and not is_rest and _is_object_type(only.annotation):
        return WholePayload(handler, only.annotation)
    return Fields(handler, fields)


class NoArguments:
    """
    The handler takes nothing, so the payload must be empty.
    """

    def __init__(self, handler: Subject) -> None:
        self._name = handler.name
        self._ignores_extra = handler.ignores_extra

    def bind(self, payload: str) -> dict[str, Any]:
        if payload == "{}":
            return {}
        keys = _json_object(self._name, payload)
        if keys and not self._ignores_extra:
            faults = [
                FieldError(pointer_to(key), "Unknown key; the handler takes none.") for key in keys
            ]
            raise InvalidPayload(self._name, faults)
        return {}

    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"$schema": DIALECT, "type": "object"}
        return schema if self._ignores_extra else {**schema, "additionalProperties": False}


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

    def __init__(self, handler: Subject, annotation: Any) -> None:
        self._handler = handler
        self._annotation = annotation
        self._adapter: TypeAdapter[Any] | None = None

    def bind(self, payload: str) -> dict[str, Any]:
        return {"payload": _validated(self._handler.name, self._prepared(), payload)}

    def schema(self) -> dict[str, Any]:
        try:
            return {"$schema": DIALECT, **self._prepared().json_schema()}
        except HandlerError:
            raise
        except Exception as error:
            raise _unreadable(self._handler, "payload", self._annotation, error) from error

    def _prepared(self) -> TypeAdapter[Any]:
        if self._adapter is None:
            from pydantic import TypeAdapter

            try:
                self._adapter = TypeAdapter(self._annotation)
            except Exception as error:  # an annotation may run code of its own
                raise _unreadable(self._handler, "payload", self._annotation, error) from error
        return self._adapter


class Fields:
    """
    The handler takes the payload's keys as its parameters.

    A parameter that the payload leaves out keeps the default of the function itself.
    """

    def __init__(self, handler: Subject, fields: list[inspect.Parameter]) -> None:
        self._handler = handler
        self._fields = [f for f in fields if f.kind is not inspect.Parameter.VAR_KEYWORD]
        self._rest = next((f for f in fields if f.kind is inspect.Parameter.VAR_KEYWORD), None)
        self._adapter: TypeAdapter[Any] | None = None

    def bind(self, payload: str) -> dict[str, Any]:
        arguments: dict[str, Any] = _validated(
            self._handler.name, self._prepared(), payload, takes=self._takes
        )
        return arguments

    def schema(self) -> dict[str, Any]:
        adapter = self._prepared()
        try:
            schema = {"$schema": DIALECT, **adapter.json_schema()}
        except Exception as error:
            raise self._unreadable(error) from error
        for field in self._fields:
            _allow_other_keys(schema, field.annotation)
        return schema

    def _takes(self) -> list[str]:
        return list(self.schema()["properties"])

    def _prepared(self) -> TypeAdapter[Any]:
        if self._adapter is None:
            try:
                self._adapter = self._made()
            except Exception as error:  # an annotation may run code of its own
                raise self._unreadable(error) from error
        return self._adapter

    def _made(self) -> TypeAdapter[Any]:
        from pydantic import ConfigDict, TypeAdapter
        from pydantic_core import SchemaError

        try:
            return TypeAdapter(self._payload_type(ConfigDict()))
        except SchemaError:
            # The default engine for patterns knows no look-around; Python's does.
            return TypeAdapter(self._payload_type(ConfigDict(regex_engine="python-re")))

    def _payload_type(self, config: ConfigDict) -> Any:
        # A TypedDict rather than a model: its keys may have any name, keys left out stay out, and
        # what validation returns is the keyword arguments themselves.
        from pydantic import with_config
        from typing_extensions import TypedDict

        keys: dict[str, Any] = {}
        for field in self._fields:
            annotation = _or_any(field.annotation)
            optional = field.default is not inspect.Parameter.empty
            keys[field.name] = (
                NotRequired[Annotated[annotation, _Default(field.default)]]
                if optional
                else Required[annotation]
            )
        if self._rest is None:
            closed = TypedDict("Payload", keys)  # type: ignore[misc]
            config["extra"] = "ignore" if self._handler.ignores_extra else "forbid"
            return with_config(config)(closed)
        rest = _or_any(self._rest.annotation)
        opened = TypedDict("Payload", keys, extra_items=rest)  # type: ignore[misc]
        config["extra"] = "allow"
        return with_config(config)(opened)

    def _unreadable(self, error: Exception) -> HandlerError:
        for field in (*self._fields, *([self._rest] if self._rest else [])):
            try:
                Fields(self._handler, [field])._made().json_schema()
            except Exception as its_error:
                return _unreadable(self._handler, field.name, field.annotation, its_error)
        return declaration_error(self._handler.name, self._handler.function, _first_line(error))


class _Default:
    """
    Tells the schema of a parameter's default, if JSON can say it; else it is the author's own.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core_schema), **_json_default(self._value)}


def _allow_other_keys(schema: dict[str, Any], annotation: Any) -> None:
    """
    Name the keys that Pydantic's schema leaves out: it tells one of `AliasChoices` only.
    """
    for key in _alias_keys(annotation):
        if key not in schema["properties"]:
            schema["properties"][key] = {}
        if key in schema.get("required", ()):
            schema["required"].remove(key)


def _alias_keys(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is not typing.Annotated:
        return []
    keys: list[str] = []
    for part in typing.get_args(annotation)[1:]:
        alias = getattr(part, "validation_alias", None) if _is_field(part) else None
        paths = getattr(alias, "choices", [alias])
        if alias is not None and not isinstance(alias, str):
            keys += [p if isinstance(p, str) else p.path[0] for p in paths]
    return keys


def _parameters(name: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(function)
        parameters = [
            _resolved(parameter, name=name, function=function)
            for parameter in signature.parameters.values()
        ]
    except ValueError as error:  # a built-in function may tell nothing of its parameters
        raise declaration_error(name, function, f"{error}; wrap it in a `def`.") from error
    for parameter in parameters:
        fault = _parameter_fault(parameter)
        if fault is not None:
            raise declaration_error(name, function, fault)
    if parameters and parameters[0].name in ("self", "cls") and _is_in_a_class(function):
        raise declaration_error(
            name,
            function,
            f"parameter {parameters[0].name!r}: a method has no object to be called on; declare a "
            "function, a static method, or the method of an object.",
        )
    return parameters


def _parameter_fault(parameter: inspect.Parameter) -> str | None:
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        return (
            f"parameter {parameter.name!r} is positional-only; a payload's keys are passed by name."
        )
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return (
            f"*{parameter.name} cannot be filled from an object; use **kwargs or a list parameter."
        )
    if _is_field(parameter.default):
        return (
            f"parameter {parameter.name!r} has a Field(...) as its default; "
            "write Annotated[..., Field(...)] and a plain default."
        )
    inner = typing.get_args(parameter.annotation)[1:]
    if typing.get_origin(parameter.annotation) is typing.Annotated and any(
        _is_field(part) and not part.is_required() for part in inner
    ):
        return (
            f"parameter {parameter.name!r} has its default inside of Field(...); "
            "write it as a plain default."
        )
    return None


def _is_field(thing: Any) -> bool:
    return type(thing).__name__ == "FieldInfo"  # recognised without importing Pydantic


def _is_in_a_class(function: Callable[..., Any]) -> bool:
    outer = getattr(function, "__qualname__", "").rpartition(".")[0]
    return bool(outer) and not outer.endswith("<locals>") and not inspect.ismethod(function)


def _resolved(
    parameter: inspect.Parameter, *, name: str, function: Callable[..., Any]
) -> inspect.Parameter:
    if parameter.annotation is inspect.Parameter.empty:
        return parameter

    class Holder:
        __annotations__ = {parameter.name: parameter.annotation}

    names = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        hints = typing.get_type_hints(Holder, globalns=names, localns={}, include_extras=True)
    except NameError as error:
        fact = (
            f"the annotation of parameter {parameter.name!r} cannot be resolved ({error}); its "
            "names must exist in the module at run time, not only under TYPE_CHECKING."
        )
        raise declaration_error(name, function, fact) from error
    except Exception as error:  # it is code, and may raise anything
        fact = f"the annotation of parameter {parameter.name!r} fails: {_first_line(error)}"
        raise declaration_error(name, function, fact) from error
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


def _unreadable(
    handler: Subject, parameter: str, annotation: Any, error: Exception
) -> HandlerError:
    kind = type(error).__name__
    if kind in ("PydanticSchemaGenerationError", "PydanticInvalidForJsonSchema"):
        fact = (
            f"no JSON becomes {inspect.formatannotation(annotation)}; use types that JSON can say, "
            "or a dataclass, TypedDict or Pydantic model."
        )
    else:
        fact = f"its type is refused: {_first_line(error)}"
    return declaration_error(handler.name, handler.function, f"parameter {parameter!r}: {fact}")


def _first_line(error: Exception) -> str:
    # What is sometimes below are a page to read and, for broken patterns, the innermost reason.
    lines = [line.strip() for line in str(error).split("For further information")[0].splitlines()]
    reasons = [line for line in lines if line.startswith("error: ")]
    return f"{type(error).__name__}: {(reasons or lines or [''])[0]}"


def _validated(
    name: str,
    adapter: TypeAdapter[Any],
    payload: str,
    *,
    takes: Callable[[], Sequence[str]] = tuple,
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
                keys = ", ".join(takes())
                detail = "Unknown key" + (f"; the handler takes {keys}." if keys else ".")
            path = _path(whole, error["loc"], is_missing=error["type"] == "missing")
            faults.append(FieldError(pointer_to(*path), detail))
        # The faults quote no input: payloads may hold secrets, and failures are shown widely.
        raise InvalidPayload(name, faults) from None


def _json_object(name: str, payload: str) -> dict[str, Any]:
    try:
        whole = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise InvalidPayload(name, [FieldError("", f"The payload is not JSON: {error}")]) from None
    if not isinstance(whole, dict):
        raise InvalidPayload(name, [FieldError("", "The payload must be a JSON object.")])
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


def _json_default(default: Any) -> dict[str, Any]:
    from pydantic_core import to_jsonable_python

    try:
        value = to_jsonable_python(default)
        json.dumps(value, allow_nan=False)
    except Exception:
        return {}  # a sentinel of the author's: it has no place in a schema
    return {"default": value}
