"""
What the measurements that are run by hand, one at a time, have in common.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support import fetch, rabbitmq
from tests.support.broker import Broker


def end_on_sigterm() -> None:
    """
    Exit on SIGTERM as on Ctrl-C, so that no server or process is left behind.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


@contextmanager
def running_broker(engine: str, version: str = rabbitmq.OLDEST) -> Iterator[Broker | None]:
    """
    Run a stock RabbitMQ for the block, downloaded if necessary; None on PostgreSQL alone.

    Raises:
        SystemExit: RabbitMQ is not available here; the message says what would help.
    """
    if engine == "postgres":
        yield None
        return
    fetch.fetch([], [version], say=lambda line: print(line, file=sys.stderr))
    if missing := rabbitmq.missing([version]):
        raise SystemExit(missing[0])
    # One scheduler per core; the tests run it with a single one.
    with rabbitmq.running_broker(version, erlang_arguments="") as broker:
        yield broker
