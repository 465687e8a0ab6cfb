"""
How an attempt ended, and what follows.

`Outcome` is the result of running a handler, as `worker/isolation` reports it. `decide` turns it
into a `Settlement`, the one transition that is written. Pure: no clock, no I/O, and the random
number is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from asyncflow.domain.retry import Backoff
from asyncflow.domain.states import Event


@dataclass(frozen=True, slots=True)
class Failure:
    """
    Why an attempt did not complete, for humans.

    Attributes:
        kind: A stable identifier: an exception's qualified name, or one of ours such as `TimedOut`.
        message: One or a few sentences, at most 4 KB.
        traceback: The handler's traceback, at most 16 KB; None if there is none.
    """

    kind: str
    message: str
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class Completed:
    """
    The handler returned; `result` is JSON text.
    """

    result: str


@dataclass(frozen=True, slots=True)
class Failed:
    """
    The attempt failed: an exception, a timeout, a memory limit, an unusable result.

    Attributes:
        retryable: False ends the task now: a rejection, an exception listed in
            `never_retry`, a payload or result that can never be right.
        after_seconds: The delay that the handler asked for; None lets the backoff decide.
    """

    failure: Failure
    retryable: bool = True
    after_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Crashed:
    """
    The process that ran the handler died, or its lease was lost.

    Charged like a failure, so that a poison task ends as failed; but the first crash is retried
    immediately, since most often the machine was at fault and not the task.
    """

    failure: Failure


@dataclass(frozen=True, slots=True)
class Cancelled:
    """
    The task was to be cancelled, and the handler has stopped.
    """

    failure: Failure


@dataclass(frozen=True, slots=True)
class Released:
    """
    The worker puts the task back without charging it, for example at shutdown.
    """


Outcome = Completed | Failed | Crashed | Cancelled | Released


OUTCOMES = {
    Event.COMPLETE: "completed",
    Event.FAIL: "failed",
    Event.CANCEL: "cancelled",
    Event.RETRY: "retried",
    Event.RELEASE: "released",
}
"""
What an attempt that ended so is called: in its row, in logs and, in capitals, over HTTP. The first
three are also the states that the task ends in.
"""


class Settlement(NamedTuple):
    """
    The transition with which an attempt ends.

    Attributes:
        event: COMPLETE, FAIL, RETRY, RELEASE or CANCEL.
        delay_seconds: For RETRY: how long until the next attempt is due.
        result: For COMPLETE: JSON text.
        failure: For FAIL, RETRY and CANCEL.
    """

    event: Event
    delay_seconds: float = 0.0
    result: str | None = None
    failure: Failure | None = None

    @property
    def outcome(self) -> str:
        """
        One of `OUTCOMES`.
        """
        return OUTCOMES[self.event]


_RELEASE = Settlement(Event.RELEASE)


def decide(
    outcome: Outcome, *, failures: int, max_attempts: int, backoff: Backoff, random: float
) -> Settlement:
    """
    Choose the one transition that follows an attempt.

    Args:
        failures: Failures before this attempt, in this generation.
        max_attempts: How many failures end the task, 1 or more.
        random: A number in [0, 1) for the backoff's jitter.
    """
    match outcome:
        case Completed(result):
            return Settlement(Event.COMPLETE, result=result)
        case Released():
            return _RELEASE
        case Cancelled(failure):
            return Settlement(Event.CANCEL, failure=failure)
        case Failed(failure, retryable, after_seconds):
            if not retryable or failures + 1 >= max_attempts:
                return Settlement(Event.FAIL, failure=failure)
            delay = after_seconds
            if delay is None:
                delay = backoff.delay_seconds(failures + 1, random=random)
            return Settlement(Event.RETRY, delay_seconds=delay, failure=failure)
        case Crashed(failure):
            if failures + 1 >= max_attempts:
                return Settlement(Event.FAIL, failure=failure)
            delay = backoff.delay_seconds(failures, random=random)
            return Settlement(Event.RETRY, delay_seconds=delay, failure=failure)
