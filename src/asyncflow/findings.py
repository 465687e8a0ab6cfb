"""
What a check of a server finds out, for `asyncflow doctor` and for every process that starts.

`store.inspection` checks PostgreSQL, and `transport` RabbitMQ; both return one finding per check,
good ones too. A process refuses to start on a finding that is wrong, waits for one
that may pass by itself, and logs one that is doubtful.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from asyncflow.errors import ServerUnfit


class Verdict(Enum):
    """
    How bad a finding is.
    """

    OK = "ok"
    """Nothing to do."""

    DOUBTFUL = "doubtful"
    """AsyncFlow works, but less well or less safely than it could."""

    WRONG = "wrong"
    """AsyncFlow does not work like this."""


@dataclass(frozen=True, slots=True)
class Finding:
    """
    What one check found out.

    No part of it holds a password or a payload: it is printed and logged.

    Attributes:
        what: What was looked at, with the server first, such as `PostgreSQL encoding`.
        sentence: The fact, such as `The database's encoding is LATIN1.`
        remedy: What to do about it, as a sentence; empty if the verdict is OK.
        may_pass: Whether something wrong may pass without anyone changing our settings, as an
            outage does. A starting process waits for it.
    """

    what: str
    verdict: Verdict
    sentence: str
    remedy: str = ""
    may_pass: bool = False

    @property
    def is_wrong(self) -> bool:
        """
        Whether AsyncFlow does not work like this.
        """
        return self.verdict is Verdict.WRONG

    @property
    def is_doubtful(self) -> bool:
        """
        Whether AsyncFlow works, but not as well as it could.
        """
        return self.verdict is Verdict.DOUBTFUL

    def __str__(self) -> str:
        return f"{self.sentence} {self.remedy}".rstrip()


def fine(what: str, sentence: str) -> Finding:
    """
    Nothing to do about `what`.
    """
    return Finding(what, Verdict.OK, sentence)


def doubtful(what: str, sentence: str, remedy: str) -> Finding:
    """
    `what` is worth a look.
    """
    return Finding(what, Verdict.DOUBTFUL, sentence, remedy)


def wrong(what: str, sentence: str, remedy: str, *, may_pass: bool = False) -> Finding:
    """
    AsyncFlow does not work with `what` as it is.
    """
    return Finding(what, Verdict.WRONG, sentence, remedy, may_pass)


def refuse_unfit(findings: Iterable[Finding]) -> None:
    """
    Return unless something is wrong that will not pass by itself.

    Raises:
        ServerUnfit: With every such finding.
    """
    refused = [str(found) for found in findings if found.is_wrong and not found.may_pass]
    if refused:
        raise ServerUnfit(refused)
