"""
What a handler may see of its attempt and ask of its worker.

The same object in every isolation: attributes to read, `cancelled` to poll, `progress` to
report. How an attempt is run and stopped lives in `worker/isolation`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from asyncflow.domain.task import Claim
from asyncflow.telemetry.logs import log, take_fields_from

MESSAGE_LENGTH_MAX = 500
"""Longer progress messages are cut, in characters."""


@dataclass(frozen=True, slots=True)
class Progress:
    """
    How far an attempt has got, as its handler reports it.

    Attributes:
        fraction: 0.0 to 1.0; None means the handler does not know.
        message: For people, at most 500 characters; None means none.
    """

    fraction: float | None = None
    message: str | None = None


class Context:
    """
    One attempt, as its handler sees it.

    Args:
        claim: The task, as it was claimed for this attempt.
        on_progress: Receives every report, in the thread that made it; must be quick,
            thread-safe and must not raise.
    """

    __slots__ = (
        "_deadline_monotonic",
        "_logger",
        "_on_progress",
        "_stop_asked",
        "_stop_seen",
        "claim",
        "deadline_timestamp",
    )

    def __init__(
        self, claim: Claim, *, on_progress: Callable[[Progress], None] | None = None
    ) -> None:
        self.claim = claim
        self.start_clock()
        self._on_progress = on_progress
        self._stop_asked = False
        self._stop_seen = False
        self._logger: Any = None

    @property
    def task_id(self) -> UUID:
        """
        The task; the same in every attempt.
        """
        return self.claim.task_id

    @property
    def name(self) -> str:
        """
        The handler's name.
        """
        return self.claim.name

    @property
    def queue(self) -> str:
        """
        Where the task waited.
        """
        return self.claim.queue

    @property
    def attempt(self) -> int:
        """
        Which attempt this is; the first is 1.
        """
        return self.claim.attempt

    @property
    def max_attempts(self) -> int:
        """
        How many failures end the task.
        """
        return self.claim.max_attempts

    @property
    def lease_id(self) -> UUID:
        """
        Fresh for every attempt. Store it with your own effects to refuse those of an attempt
        that lost its lease.
        """
        return self.claim.lease_id

    @property
    def tenant_id(self) -> int:
        """
        Whose task it is.
        """
        return self.claim.tenant_id

    @property
    def timeout_seconds(self) -> float:
        """
        How long this attempt may take, from its start.
        """
        return self.claim.timeout_seconds

    def start_clock(self) -> None:
        """
        Start the attempt's time. Called by the code that runs the attempt.
        """
        self.deadline_timestamp = time.time() + self.timeout_seconds
        self._deadline_monotonic = time.monotonic() + self.timeout_seconds

    @property
    def deadline(self) -> datetime:
        """
        When this attempt's time is up, in UTC by this machine's clock.

        For people and for requests to others; measure with `remaining_seconds`, which no
        clock change disturbs.
        """
        return datetime.fromtimestamp(self.deadline_timestamp, UTC)

    def remaining_seconds(self) -> float:
        """
        How much of the attempt's time is left; 0.0 when it is up.
        """
        return max(0.0, self._deadline_monotonic - time.monotonic())

    @property
    def cancelled(self) -> bool:
        """
        Whether this attempt should end now: cancelled, timed out, or its worker is stopping.

        For `def` handlers, which nothing interrupts: poll it in long loops, clean up, and
        leave by `raise_if_cancelled`. An `async def` handler receives
        `asyncio.CancelledError` instead. What a handler returns after it has seen True here is not
        kept: it may be half the work.
        """
        if self._stop_asked:
            self._stop_seen = True
        return self._stop_asked

    def raise_if_cancelled(self) -> None:
        """
        Leave the handler if this attempt should end now.

        Raises:
            asyncio.CancelledError: If `cancelled`; let it pass.
        """
        if self.cancelled:
            raise asyncio.CancelledError

    @property
    def logger(self) -> Any:
        """
        A structlog logger whose lines carry the task's id, name and attempt.
        """
        if self._logger is None:
            # Most attempts log nothing; they should not pay for the binding, nor for structlog.
            self._logger = log.structlog().bind(**self.log_fields())
        return self._logger

    def log_fields(self) -> dict[str, Any]:
        """
        What every line of this attempt carries, whatever logs it.

        No key is an attribute of `logging.LogRecord`, as `name` is: a user's structlog may hand
        them to `logging` as `extra`, which refuses those.
        """
        return {"task_id": str(self.task_id), "task_name": self.name, "attempt": self.attempt}

    def progress(self, fraction: float | None = None, message: str | None = None) -> None:
        """
        Tell how far the work has come; the latest report wins.

        Returns immediately in every isolation; of reports that follow one another quickly, some
        are dropped. Values out of range are clamped: a progress bar must not fail a task.
        """
        if self._on_progress is not None:
            self._on_progress(Progress(_clamped(fraction), _shortened(message)))

    def ask_to_stop(self) -> None:
        """
        Make `cancelled` true. For the code that runs the attempt; safe from any thread.
        """
        self._stop_asked = True

    @property
    def stop_seen(self) -> bool:
        """
        Whether the handler read `cancelled` after the request. For the code that runs the attempt.
        """
        return self._stop_seen


CURRENT: ContextVar[Context] = ContextVar("asyncflow_context")
"""Set around every call of a handler."""


def _log_fields_here() -> dict[str, Any]:
    context = CURRENT.get(None)
    return {} if context is None else context.log_fields()


take_fields_from(_log_fields_here)


def current_context() -> Context:
    """
    The context of the attempt that this code runs in, for code too deep to be handed one.

    Raises:
        LookupError: Outside of a handler.
    """
    try:
        return CURRENT.get()
    except LookupError:
        raise LookupError(
            "No attempt runs here; current_context() works inside handlers only."
        ) from None


def _clamped(fraction: float | None) -> float | None:
    if fraction is None or fraction != fraction:  # NaN
        return None
    return float(min(1.0, max(0.0, fraction)))


def _shortened(message: str | None) -> str | None:
    if message is None:
        return None
    whole = str(message)[:MESSAGE_LENGTH_MAX].replace("\x00", "\ufffd")
    return whole.encode("utf-8", "replace").decode() if not whole.isascii() else whole
