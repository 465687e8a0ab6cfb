"""
Threads for handlers, in the worker's own process.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue


class Threads:
    """
    Threads that are reused, and that an exiting process does not wait for.

    `ThreadPoolExecutor` has its threads joined at exit, so one stuck handler would keep a
    worker from ending. There is no bound here: the worker's slots are the bound, and a
    thread that got stuck must not take the place of a live one.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0

    def run(self, job: Callable[[], None]) -> None:
        """
        Run `job`, which must not raise, with a copy of the caller's context variables.

        Raises:
            RuntimeError: No thread could be started; the job will not run.
        """
        context = contextvars.copy_context()
        with self._lock:
            start = self._idle == 0
            self._idle -= not start
        if start:
            # Before the job is in the queue, where a later thread would find it.
            threading.Thread(target=self._work, name="asyncflow-handler", daemon=True).start()
        self._jobs.put(lambda: context.run(job))

    def close(self) -> None:
        """
        Let idle threads end; busy ones end after their job.
        """
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # an idle thread would keep the last attempt and its payload alive
            with self._lock:
                self._idle += 1
        self._jobs.put(None)  # for the next thread
