"""
One call of a handler: everything it can do, as one outcome.

Both functions never raise, whatever the handler returns or raises; so they may run as an
asyncio task, where SystemExit would end the loop, and in a bare thread alike. When to stop
a call, and what that means, is decided in `worker/isolation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncflow.domain.outcome import Completed, Failed, Failure, Outcome
from asyncflow.errors import InvalidPayload, Reject, Retry
from asyncflow.handlers.context import CURRENT, Context
from asyncflow.handlers.encoding import (
    MESSAGE_BYTES_MAX,
    Unstorable,
    clip,
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
        return failed(error, handler.never_retry)


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
        return failed(error, handler.never_retry)


def failed(error: BaseException, never_retry: tuple[type[BaseException], ...] = ()) -> Failed:
    """
    What it means that a handler raised `error`.

    An exception group, as a TaskGroup raises it, counts as its member when it has one.
    """
    signal = _only_member(error)
    if isinstance(signal, Retry):
        return Failed(
            Failure("Retry", clip(str(signal), MESSAGE_BYTES_MAX)),
            after_seconds=signal.after_seconds,
        )
    if isinstance(signal, Reject):
        return Failed(Failure("Reject", clip(str(signal), MESSAGE_BYTES_MAX)), retryable=False)
    if isinstance(error, InvalidPayload):
        return Failed(Failure("InvalidPayload", clip(str(error), MESSAGE_BYTES_MAX)), False)
    if isinstance(error, Unstorable):
        return Failed(Failure(error.kind, clip(str(error), MESSAGE_BYTES_MAX)), False)
    failure = Failure(error_kind(error), error_message(error), error_traceback(error))
    return Failed(failure, retryable=not _is_listed(error, never_retry))


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
