"""
The results of checking a server, for `asyncflow doctor` and for every process that starts.

`store.inspection` checks PostgreSQL and `transport.rabbitmq.inspection` RabbitMQ; both return one
finding per check, including the good ones. A starting process refuses a finding that is wrong,
waits for one that may pass, and logs one that is doubtful.
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
    The result of one check. It is printed and logged, so it contains no password and no payload.

    Attributes:
        what: What was checked, with the server first, such as `PostgreSQL encoding`.
        sentence: The fact, such as `The database's encoding is LATIN1.`
        remedy: What to do about it, as a sentence; empty if the verdict is OK.
        may_pass: Whether what is wrong may pass without a change of settings, as an outage
            does. A starting process waits for it.
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
    A finding that needs no action.
    """
    return Finding(what, Verdict.OK, sentence)


def doubtful(what: str, sentence: str, remedy: str) -> Finding:
    """
    A finding with which AsyncFlow works, but less well than it could.
    """
    return Finding(what, Verdict.DOUBTFUL, sentence, remedy)


def wrong(what: str, sentence: str, remedy: str, *, may_pass: bool = False) -> Finding:
    """
    A finding with which AsyncFlow does not work.
    """
    return Finding(what, Verdict.WRONG, sentence, remedy, may_pass)


def refuse_unfit(findings: Iterable[Finding]) -> None:
    """
    Raise if something is wrong that will not pass by itself.

    Raises:
        ServerUnfit: Lists every such finding.
    """
    refused = [str(found) for found in findings if found.is_wrong and not found.may_pass]
    if refused:
        raise ServerUnfit(refused)
