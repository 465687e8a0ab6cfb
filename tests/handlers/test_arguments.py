"""
A handler's signature is its contract: what it accepts, what it refuses, what it publishes.
"""

import dataclasses
import datetime
import decimal
import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, cast

import annotated_types
import jsonschema_rs
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import TypedDict

from asyncflow.errors import HandlerError, InvalidPayload
from asyncflow.handlers import Context, Handler


class Order(pydantic.BaseModel):
    id: uuid.UUID
    lines: list[int] = []


class StrictOrder(Order):
    model_config = pydantic.ConfigDict(extra="forbid")


@dataclasses.dataclass
class Point:
    x: int
    y: int = 0


class Address(TypedDict):
    street: str


Function = Callable[..., Any]


def declared(function: Function) -> Handler:
    return Handler(name="sample", function=function, isolation="thread")


def nothing(): ...
def only_context(context: Context): ...
def bare(payload: dict[str, Any]): ...
def bare_without_a_type(payload): ...
def bare_mapping(payload: Mapping[str, Any]): ...
def rest_only(**rest): ...
def typed_rest(first: int, **rest: int): ...
def model(payload: Order): ...
def strict_model(payload: StrictOrder): ...
def point(payload: Point): ...
def address(payload: Address): ...
def counts(payload: dict[str, int]): ...
def one_model(order: Order): ...
def number_named_payload(payload: int): ...
def plain(name: str, count: int = 1, tags: list[str] | None = None): ...
def with_context(name: str, ctx: Context | None, day: datetime.date): ...
def bounded(seconds: Annotated[float, annotated_types.Interval(ge=0, le=10)] = 5.0): ...
def choice(colour: Literal["red", "green"]): ...
def awkward(schema: int, json: int, model_config: int, _private: int, copy: int = 0): ...
def rich(at: datetime.datetime, price: decimal.Decimal, key: uuid.UUID, where: Point): ...
def either(value: int | list[str]): ...
def renamed(user_id: Annotated[int, pydantic.Field(alias="userId")] = 0, note: str = ""): ...
def renamed_without_default(user_id: Annotated[int, pydantic.Field(alias="userId")]): ...
def renamed_twice(
    user_id: Annotated[
        int,
        pydantic.Field(
            validation_alias=pydantic.AliasChoices(
                "userId", "uid", pydantic.AliasPath("user", "id")
            )
        ),
    ],
): ...
def looks_ahead(code: Annotated[str, pydantic.Field(pattern=r"^(?=.*\d).+$")], n: int = 1): ...


MODEL = Order(id=uuid.UUID(int=1), lines=[1])

FITTING = [
    (nothing, {}, {}),
    (only_context, {}, {}),
    (bare, {"a": [1]}, {"payload": {"a": [1]}}),
    (bare_without_a_type, {"a": 1}, {"payload": {"a": 1}}),
    (bare_mapping, {}, {"payload": {}}),
    (rest_only, {"a": 1, "b": None}, {"a": 1, "b": None}),
    (typed_rest, {"first": 1, "b": 2}, {"first": 1, "b": 2}),
    (model, {"id": str(MODEL.id), "lines": [1]}, {"payload": MODEL}),
    (point, {"x": 1}, {"payload": Point(1)}),
    (address, {"street": "x"}, {"payload": {"street": "x"}}),
    (counts, {"a": 1}, {"payload": {"a": 1}}),
    (one_model, {"order": {"id": str(MODEL.id), "lines": [1]}}, {"order": MODEL}),
    (number_named_payload, {"payload": 3}, {"payload": 3}),
    (plain, {"name": "n"}, {"name": "n"}),
    (plain, {"name": "n", "count": 2, "tags": None}, {"name": "n", "count": 2, "tags": None}),
    (
        with_context,
        {"name": "n", "day": "2026-01-02"},
        {"name": "n", "day": datetime.date(2026, 1, 2)},
    ),
    (bounded, {}, {}),
    (bounded, {"seconds": 10}, {"seconds": 10.0}),
    (choice, {"colour": "red"}, {"colour": "red"}),
    (
        awkward,
        {"schema": 1, "json": 2, "model_config": 3, "_private": 4},
        {"schema": 1, "json": 2, "model_config": 3, "_private": 4},
    ),
    (
        rich,
        {
            "at": "2026-01-02T03:04:05Z",
            "price": "1.10",
            "key": str(uuid.UUID(int=2)),
            "where": {"x": 1, "y": 2},
        },
        {
            "at": datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
            "price": decimal.Decimal("1.10"),
            "key": uuid.UUID(int=2),
            "where": Point(1, 2),
        },
    ),
    (either, {"value": ["a"]}, {"value": ["a"]}),
    (renamed, {}, {}),
    (renamed, {"userId": 7}, {"user_id": 7}),
    (renamed_without_default, {"userId": 7}, {"user_id": 7}),
    (renamed_twice, {"userId": 7}, {"user_id": 7}),
    (renamed_twice, {"uid": 7}, {"user_id": 7}),
    (renamed_twice, {"user": {"id": 7}}, {"user_id": 7}),
    (looks_ahead, {"code": "a1"}, {"code": "a1"}),
]

RICH = {"at": "2026-01-02T03:04:05Z", "price": "1", "key": str(MODEL.id), "where": {"x": 1}}

UNFITTING = [
    (nothing, {"a": 1}, "/a"),
    (only_context, {"context": {}}, "/context"),
    (typed_rest, {"first": 1, "b": "x"}, "/b"),
    (model, {}, "/id"),
    (model, {"id": "no", "lines": []}, "/id"),
    (model, {"id": str(MODEL.id), "lines": [1, [], 3]}, "/lines/1"),
    (strict_model, {"id": str(MODEL.id), "more": 1}, "/more"),
    (point, {"x": "no"}, "/x"),
    (address, {}, "/street"),
    (counts, {"a/b~c": "no"}, "/a~1b~0c"),
    (one_model, {"order": {"id": None}}, "/order/id"),
    (number_named_payload, {"payload": "no"}, "/payload"),
    (plain, {}, "/name"),
    (plain, {"name": "n", "nmae": "n"}, "/nmae"),
    (plain, {"name": "n", "count": None}, "/count"),
    (plain, {"name": "n", "tags": ["a", 1]}, "/tags/1"),
    (with_context, {"name": "n", "day": "2026-01-02", "ctx": None}, "/ctx"),
    (bounded, {"seconds": 10.5}, "/seconds"),
    (choice, {"colour": "blue"}, "/colour"),
    (rich, RICH | {"at": "yesterday"}, "/at"),
    (rich, RICH | {"where": {}}, "/where/x"),
    (either, {"value": {}}, "/value"),
    (either, {"value": [{}]}, "/value/0"),
    (renamed, {"user_id": 7}, "/user_id"),
    (renamed, {"userId": "no"}, "/userId"),
    (renamed_without_default, {}, "/userId"),
    (renamed_twice, {"userId": "no"}, "/userId"),
    (looks_ahead, {"code": "a"}, "/code"),
]


@pytest.mark.parametrize(("function", "payload", "arguments"), FITTING)
def test_a_payload_becomes_arguments(
    function: Function, payload: Any, arguments: dict[str, Any]
) -> None:
    """
    Keys become parameters of the annotated types; the function's own defaults apply.
    """
    assert arguments == declared(function).bind(json.dumps(payload))


@pytest.mark.parametrize(("function", "payload", "pointer"), UNFITTING)
def test_a_wrong_payload_is_refused_with_its_place(
    function: Function, payload: Any, pointer: str
) -> None:
    """
    The error's JSON pointer leads to the wrong value, or to where one is missing.
    """
    with pytest.raises(InvalidPayload) as refusal:
        declared(function).bind(json.dumps(payload))

    assert pointer in [fault.pointer for fault in refusal.value.errors]


@pytest.mark.parametrize(("function", "payload", "arguments"), FITTING)
def test_the_schema_allows_what_bind_takes(
    function: Function, payload: Any, arguments: dict[str, Any]
) -> None:
    """
    The published schema allows every payload that `bind` accepts, so a check against it refuses no
    valid task.
    """
    schema = declared(function).payload_schema()

    assert jsonschema_rs.is_valid(schema, payload, validate_formats=True)


@pytest.mark.parametrize(("function", "payload", "pointer"), UNFITTING)
def test_the_schema_refuses_what_bind_refuses(
    function: Function, payload: Any, pointer: str
) -> None:
    """
    The published schema refuses what `bind` refuses, so a payload that passes the API's check does
    not fail in the worker.
    """
    schema = declared(function).payload_schema()

    assert not jsonschema_rs.is_valid(schema, payload, validate_formats=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "n", "red"]),
    lambda children: (
        st.lists(children, max_size=2)
        | st.dictionaries(st.sampled_from(["x", "y"]), children, max_size=2)
    ),
    max_leaves=4,
)


@given(
    function=st.sampled_from([nothing, typed_rest, point, plain, bounded, choice, either, counts]),
    payload=st.dictionaries(
        st.sampled_from(
            ["first", "x", "y", "name", "count", "tags", "seconds", "colour", "value", "other"]
        ),
        json_values,
        max_size=3,
    ),
)
def test_schema_and_bind_agree(function: Function, payload: Any) -> None:
    """
    `bind` accepts everything that the schema allows; it accepts more only through Pydantic's lax
    conversions.
    """
    handler = declared(function)
    try:
        handler.bind(json.dumps(payload))
        taken = True
    except InvalidPayload:
        taken = False

    allowed = jsonschema_rs.is_valid(handler.payload_schema(), payload)

    assert taken or not allowed
    if taken and not allowed:
        # Lax mode accepts true as a number. The examples have no numbers in strings.
        assert any(isinstance(leaf, bool) for leaf in _leaves(payload))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


@pytest.mark.parametrize("payload", ["", "{", "[]", "null", '"text"', "7"])
@pytest.mark.parametrize("function", [nothing, bare, rest_only, plain, model])
def test_only_objects_are_payloads(function: Function, payload: Any) -> None:
    """
    Any payload but an object is refused as a whole.
    """
    with pytest.raises(InvalidPayload) as refusal:
        declared(function).bind(payload)

    assert "" == refusal.value.errors[0].pointer


def test_an_unknown_key_names_what_the_handler_takes() -> None:
    """
    The error lists the known keys, so the author of a misspelt one sees the right one.
    """
    with pytest.raises(InvalidPayload, match="the handler takes name, count, tags"):
        declared(plain).bind('{"name": "n", "cuont": 1}')


def test_a_refusal_does_not_quote_the_payload() -> None:
    """
    The error does not quote the payload: payloads may hold secrets, and more people see failures.
    """
    with pytest.raises(InvalidPayload) as refusal:
        declared(plain).bind('{"name": {"password": "s3cret"}}')

    assert "s3cret" not in str(refusal.value)


def test_the_schema_says_which_dialect_it_is_and_what_is_left_out() -> None:
    """
    The schema names its dialect, and publishes the defaults of optional parameters.
    """
    schema = declared(plain).payload_schema()

    assert "https://json-schema.org/draft/2020-12/schema" == schema["$schema"]
    assert ["name"] == schema["required"]
    assert {1, None} == {schema["properties"][name]["default"] for name in ("count", "tags")}


def test_a_default_that_is_no_json_is_left_out_of_the_schema() -> None:
    """
    A default that JSON cannot represent, such as a sentinel, is not published, and the function
    still gets it.
    """
    sentinel = object()

    def function(value: Any = sentinel): ...

    assert "default" not in declared(function).payload_schema()["properties"]["value"]
    assert {} == declared(function).bind("{}")


class Plain: ...


class Mailer:
    def send(self, address: str): ...
    @classmethod
    def of_the_class(cls, address: str): ...
    @staticmethod
    def of_no_object(address: str): ...


class Explosive:
    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        raise RuntimeError("not today")


def positional_only(a: int, /): ...
def any_number(*values: int): ...
def two_contexts(a: Context, b: Context): ...
def field_as_default(a: int = pydantic.Field(5)): ...
def default_in_field(a: Annotated[int, pydantic.Field(default=5)]): ...
def unknown_name(a: "Missing"): ...  # type: ignore[name-defined] # noqa: F821
def failing_annotation(a: "1 / 0"): ...  # type: ignore[valid-type]
def arbitrary(a: int, b: Plain): ...
def arbitrary_item(a: int, b: list[Plain] | None = None): ...
def arbitrary_rest(a: int, **more: Plain): ...
def arbitrary_payload(payload: dict[str, Plain]): ...
def callback(a: Callable[[], int]): ...
def wrong_pattern(a: Annotated[str, pydantic.Field(pattern="(")]): ...
def explosive(a: int, b: Explosive): ...
def final(a: Final[int]): ...  # type: ignore[valid-type]


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (positional_only, "'a' is positional-only"),
        (any_number, r"\*values cannot be filled"),
        (two_contexts, "two parameters are annotated Context: a, b"),
        (field_as_default, "'a' has a Field.* write Annotated"),
        (default_in_field, "'a' has its default inside of Field"),
        (unknown_name, "parameter 'a' cannot be resolved .name 'Missing' is not defined"),
        (failing_annotation, "parameter 'a' fails: "),
        (Mailer.send, "'self': a method has no object"),
        (arbitrary, "parameter 'b': no JSON becomes .*Plain; use types"),
        (arbitrary_item, "parameter 'b': no JSON becomes .*Plain.*; use types"),
        (arbitrary_rest, "parameter 'more': no JSON becomes"),
        (arbitrary_payload, "parameter 'payload': no JSON becomes"),
        (callback, "parameter 'a': no JSON becomes .*Callable"),
        (wrong_pattern, "parameter 'a': its type is refused: "),
        (explosive, "parameter 'b': its type is refused: RuntimeError: not today"),
        (final, "parameter 'a'"),
    ],
)
def test_a_signature_that_no_payload_fills_is_an_error(function: Function, sentence: str) -> None:
    """
    One sentence, at the worker's start, names file, function and parameter for the handler's
    author.
    """
    with pytest.raises(HandlerError, match=sentence) as error:
        declared(function).check()

    place = f"Handler 'sample' ({function.__qualname__} in {__file__}, line "
    assert str(error.value).startswith(place)
    assert 1 == len(str(error.value).splitlines())
    assert "arbitrary_types_allowed" not in str(error.value)


@pytest.mark.parametrize(
    "function", [Mailer().send, Mailer.of_the_class, Mailer.of_no_object], ids=lambda f: f.__name__
)
def test_a_method_that_needs_no_object_is_a_function(function: Function) -> None:
    """
    A bound method, class method or static method counts as a function: it needs no further object.
    """
    assert {"address": "a@b"} == declared(function).bind('{"address": "a@b"}')


def test_keys_that_no_parameter_names_can_be_ignored() -> None:
    """
    With `extra="ignore"`, payloads from before or after a change of the signature still run.
    """
    tolerant = Handler(name="sample", function=plain, isolation="thread", extra="ignore")
    empty = Handler(name="sample", function=nothing, isolation="thread", extra="ignore")

    assert {"name": "n"} == tolerant.bind('{"name": "n", "cuont": 1}')
    assert {} == empty.bind('{"name": "n"}')
    for handler in (tolerant, empty):
        assert jsonschema_rs.is_valid(handler.payload_schema(), {"name": "n", "more": 1})


def test_the_context_comes_under_any_name() -> None:
    """
    The context parameter is recognised by its type, and no key of the payload can replace it.
    """
    marker = cast(Context, object())

    arguments = declared(with_context).arguments('{"name": "n", "day": "2026-01-02"}', marker)

    assert marker is arguments["ctx"]


def test_handlers_without_types_run_without_pydantic() -> None:
    """
    Handlers without types do not import Pydantic, so a child process that runs them stays small and
    starts fast.
    """
    code = """
import sys
from asyncflow.handlers import Context, Handler
def f(payload: dict, context: Context): ...
def g(**rest): ...
async def h(): ...
Handler(name="f", function=f, isolation="thread").arguments('{"a": 1}', None)
Handler(name="g", function=g, isolation="thread").arguments('{"a": 1}', None)
Handler(name="h", function=h).arguments('{}', None)
import asyncflow.worker.isolation.isolation, asyncflow.worker.isolation.child_process
sys.exit("pydantic" in sys.modules)
"""
    path = f"import sys; sys.path[:] = {sys.path!r}\n"
    assert 0 == subprocess.run([sys.executable, "-c", path + code], check=False).returncode
