"""
The duties of process 1, the first process of a container.

The kernel delivers process 1 only the signals that it handles, so a request to stop that comes
before it is ready would be lost. And it becomes the parent of every orphan, which stays a zombie
until its parent waits for it. A process that runs handlers cannot wait for all children: it would
take the exit statuses that handlers wait for. So process 1 passes signals on and reaps, and the
command runs in a child. `tini` and `docker run --init` do the same.
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
    Continue in a child if this is process 1; to be called before anything is started.
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
    Reap every process that ends, and exit as `child` does.
    """
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)  # as shells report it
