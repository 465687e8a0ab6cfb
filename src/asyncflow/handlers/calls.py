"""
One call of a handler: everything it can do, as one outcome.

Both functions never raise, whatever the handler returns or raises; so they may run as an
asyncio task, where SystemExit would end the loop, and in a bare thread alike. When to stop
a call, and what that means, is decided in `worker/isolation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncflow.domain.outcome import Completed, Failed, Failure, Outcome
from asyncflow.errors import AFTER_SECONDS_MAX, InvalidPayload, Reject, Retry
from asyncflow.handlers.context import CURRENT, Context
from asyncflow.handlers.encoding import (
    Unstorable,
    encode_result,
    error_kind,
    error_message,
    error_traceback,
)

if TYPE_CHECKING:
    from asyncflow.handlers.registry import Handler


async def call_async(
    handler: Handler, payload: str, context: Context, *, result_bytes_max: int
) -> Outcome:
    """
    Await an `async def` handler.
    """
    try:
        CURRENT.set(context)
        result = await handler.function(**handler.arguments(payload, context))
        return Completed(encode_result(result, bytes_max=result_bytes_max))
    except BaseException as error:
        return _failed_in(handler, error)


def call_blocking(
    handler: Handler, payload: str, context: Context, *, result_bytes_max: int
) -> Outcome:
    """
    Call a `def` handler in this thread.
    """
    try:
        CURRENT.set(context)
        result = handler.function(**handler.arguments(payload, context))
        return Completed(encode_result(result, bytes_max=result_bytes_max))
    except BaseException as error:
        return _failed_in(handler, error)


def _failed_in(handler: Handler, error: BaseException) -> Failed:
    return failed(error, handler.never_retry, retries_invalid=handler.invalid_payload == "retry")


def failed(
    error: BaseException,
    never_retry: tuple[type[BaseException], ...] = (),
    *,
    retries_invalid: bool = False,
) -> Failed:
    """
    What it means that a handler raised `error`; never raises, whatever that is.

    An exception group, as a TaskGroup raises it, counts as its member when it has one.

    Args:
        retries_invalid: Whether a payload that does not fit may be tried again.
    """
    try:
        return _judged(error, never_retry, retries_invalid=retries_invalid)
    except BaseException:
        # The handler's own class of errors has code that fails when it is looked at. That must
        # not leave the attempt without an end.
        return Failed(_failure(error))


def _judged(
    error: BaseException, never_retry: tuple[type[BaseException], ...], *, retries_invalid: bool
) -> Failed:
    signal = _only_member(error)
    if isinstance(signal, Retry):
        return Failed(
            Failure("Retry", error_message(signal)), after_seconds=_wait_asked_for(signal)
        )
    if isinstance(signal, Reject):
        return Failed(Failure("Reject", error_message(signal)), retryable=False)
    if isinstance(error, InvalidPayload):
        failure = Failure("InvalidPayload", error_message(error))
        return Failed(failure, retryable=retries_invalid)
    if isinstance(error, Unstorable):
        return Failed(Failure(error.kind, error_message(error)), retryable=False)
    return Failed(_failure(error), retryable=not _is_listed(error, never_retry))


def _failure(error: BaseException) -> Failure:
    return Failure(error_kind(error), error_message(error), error_traceback(error))


def _wait_asked_for(signal: Retry) -> float | None:
    # A subclass need not have called our `__init__`, which checks it.
    wanted = getattr(signal, "after_seconds", None)
    if isinstance(wanted, int | float) and 0 <= wanted <= AFTER_SECONDS_MAX:
        return float(wanted)
    return None


def _only_member(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _is_listed(error: BaseException, listed: tuple[type[BaseException], ...]) -> bool:
    if not listed:
        return False
    if isinstance(error, BaseExceptionGroup) and not isinstance(error, listed):
        return error.split(listed)[1] is None
    return isinstance(error, listed)
