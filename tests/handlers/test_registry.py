"""
Functions become handlers if their declaration is valid and their name unique.
"""

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from asyncflow.domain.policy import Policy
from asyncflow.domain.retry import Backoff
from asyncflow.errors import HandlerError
from asyncflow.handlers import Registry, handler

Function = Callable[..., Any]


async def async_function(): ...
def function(): ...
async def async_generator():
    yield 1


def generator():  # fmt: skip
    yield 1


def test_a_handler_is_named_after_its_function() -> None:
    """
    The name has hyphens for underscores, as is usual in URLs and on command lines.
    """
    registry = Registry()

    @handler(registry=registry)
    async def send_invoice(): ...

    assert ("send-invoice",) == registry.names


def test_a_decorated_function_stays_as_it_was() -> None:
    """
    The decorator returns the function unchanged, so it can be called and tested like any other.
    """
    registry = Registry()

    assert function is handler("name", registry=registry)(function)


def test_a_declaration_becomes_the_handlers_policy() -> None:
    """
    Every argument reaches the handler, and omitted ones have the documented defaults.
    """
    registry = Registry()
    backoff = Backoff(base_seconds=1)
    handler(
        "a",
        queue="slow",
        max_attempts=9,
        timeout_seconds=60,
        backoff=backoff,
        never_retry=(KeyError,),
        isolation="process",
        memory_bytes_max=1 << 30,
        registry=registry,
    )(function)
    handler("b", registry=registry)(function)

    a, b = registry
    assert Policy("slow", 9, 60, backoff) == a.policy
    assert ((KeyError,), "process", 1 << 30) == (a.never_retry, a.isolation, a.memory_bytes_max)
    assert (Policy(), "thread", None) == (b.policy, b.isolation, b.memory_bytes_max)
    assert ("default", "slow") == registry.queues


@pytest.mark.parametrize(
    ("declared", "isolation", "resulting"),
    [
        (async_function, None, "loop"),
        (function, None, "thread"),
        (async_function, "process", "process"),
        (function, "process", "process"),
    ],
)
def test_the_kind_of_function_decides_the_isolation(
    declared: Function, isolation: Any, resulting: str
) -> None:
    """
    An `async def` runs in the loop and a `def` in a thread, unless the author asks for a process.
    """
    registry = Registry()

    handler("name", isolation=isolation, registry=registry)(declared)

    assert resulting == next(iter(registry)).isolation


@pytest.mark.parametrize(
    ("declared", "arguments", "sentence"),
    [
        (function, {"isolation": "loop"}, "needs `async def`"),
        (async_function, {"isolation": "thread"}, "needs `def`"),
        (function, {"isolation": "vm"}, "none of 'loop', 'thread', 'process'"),
        (function, {"memory_bytes_max": 1 << 30}, "needs isolation='process'"),
        (function, {"isolation": "process", "memory_bytes_max": 5}, "at least 1048576"),
        (function, {"never_retry": ValueError}, "must be a tuple"),
        (function, {"never_retry": (1,)}, "must be a tuple"),
        (function, {"max_attempts": 0}, "max_attempts=0"),
        (function, {"timeout_seconds": 0}, "timeout_seconds=0"),
        (function, {"queue": "no queue"}, "'no queue'"),
        (generator, {}, "`yield`"),
        (async_generator, {}, "`yield`"),
        (Registry, {}, "only functions"),
        (functools.partial(function), {}, "only functions .* partial; call it from a `def`"),
        (function, {"extra": "allow"}, "neither 'forbid' nor 'ignore'"),
        (function, {"invalid_payload": "ignore"}, "neither 'fail' nor 'retry'"),
    ],
)
def test_a_contradictory_declaration_is_an_error(
    declared: Function, arguments: dict[str, Any], sentence: str
) -> None:
    """
    The decorator raises an error with the handler's name and what would be valid.
    """
    with pytest.raises(HandlerError, match=rf"Handler 'name' \(.*\): .*{sentence}"):
        handler("name", registry=Registry(), **arguments)(declared)


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "x" * 129, "a\n"])
def test_a_name_that_urls_and_queues_cannot_carry_is_an_error(name: str) -> None:
    """
    A handler's name follows the same rule as those of tasks and queues.
    """
    with pytest.raises(HandlerError, match="use 1 to 128 of"):
        handler(name, registry=Registry())(function)


def test_two_functions_of_one_name_are_an_error_that_names_both() -> None:
    """
    Two functions with the same name are refused: which of them ran would depend on the order of
    imports.
    """
    registry = Registry()
    handler("name", registry=registry)(function)

    with pytest.raises(HandlerError) as error:
        handler("name", registry=registry)(async_function)

    assert f": function in {__file__}, line " in str(error.value)
    assert f" and async_function in {__file__}, line " in str(error.value)


def test_the_same_function_may_be_added_again() -> None:
    """
    Adding the same function again is allowed, since a module may be imported twice.
    """
    registry = Registry()

    for _ in range(2):
        handler("name", registry=registry)(function)

    assert 1 == len(registry)


def test_an_unknown_name_is_no_handler() -> None:
    """
    Names come from tasks, so they are looked up in the registry and nowhere else.
    """
    registry = Registry()

    assert [None] * 3 == [registry.get(name) for name in ("", "os.system", "__class__")]


def test_a_handlers_exceptions_and_results_reach_its_tests() -> None:
    """
    A handler called directly behaves like the plain function, without AsyncFlow.
    """

    @handler("direct", registry=Registry())
    async def double(value: int) -> int:
        return 2 * value

    assert 4 == asyncio.run(double(2))
