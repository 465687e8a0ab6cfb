"""
What the first process of a container owes the others.

The kernel delivers it only the signals that it handles, so that a stop which comes before it is
ready would be lost; and whatever lost its parent becomes its child, and stays a zombie until it
is waited for. A process that runs handlers cannot wait for all its children: it would steal the
ends of those that handlers wait for. So this process does that and nothing else, and what was
asked for runs in a child. `tini` and `docker run --init` are the same.
"""

from __future__ import annotations

import os
import signal
from typing import NoReturn

PASSED_ON = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
)


def step_aside() -> None:
    """
    Go on in a child if this is the first process; to be called before anything was begun.
    """
    if os.getpid() != 1:
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    child = os.fork()
    if child:
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_SETMASK, former)
    if child:
        _stand_in_for(child)


def _stand_in_for(child: int) -> NoReturn:
    """
    Reap every process that ends, and end as `child` does.
    """
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)  # as shells say it
