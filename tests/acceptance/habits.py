"""
What people do inside handlers, in the isolation named by the environment.

Each habit does something that is fine in a standalone program, and may leave something behind. Run
as `<name>.<isolation>` it returns `RESULT`; any other result is what the habit did to itself.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

from asyncflow import Context, handler
from asyncflow.stopping import CHECK_SECONDS

ISOLATION: Any = os.environ.get("ASYNCFLOW_TEST_ISOLATION", "loop")
RESULT = "as it should be"
STAYS_SECONDS = 300

kept: list[object] = []
customer: ContextVar[str] = ContextVar("customer")


# Forks


def forks() -> object:
    """
    Fork and wait for the child, which exits on its own.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def forks_and_returns_twice() -> object:
    """
    Fork and let the child return too, into AsyncFlow's own code.
    """
    os.fork()
    return True


def forks_and_stays() -> object:
    """
    Fork a child that is never waited for and would outlive the worker.
    """
    if os.fork() == 0:
        os.closerange(0, 256)  # No test waits for its output either, not even by a logger.
        time.sleep(STAYS_SECONDS)
        os._exit(0)
    return True


def ends_a_forked_process() -> object:
    """
    End a forked child by SIGTERM, which must reach the child alone.
    """
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[STAYS_SECONDS])
    process.start()
    process.terminate()
    process.join()
    return process.exitcode == -signal.SIGTERM


def interrupts_a_forked_process() -> object:
    """
    Interrupt a forked child, as Ctrl-C does.
    """
    pid = os.fork()
    if pid == 0:
        try:
            time.sleep(STAYS_SECONDS)
        finally:
            os._exit(3)
    time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    # With or without Python's own handler, which the child processes of workers lack.
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (3, -signal.SIGINT)


def uses_pools() -> object:
    """
    Use three process pools in a row; leaving each ends its processes by SIGTERM.
    """
    for _ in range(3):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            if pool.map(abs, [-1, -2]) != [1, 2]:
                return "wrong"
    return True


def leaves_a_busy_pool() -> object:
    """
    Leave a process pool while its processes are working.
    """
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.apply_async(time.sleep, [STAYS_SECONDS])
        pool.apply(abs, [-1])
    return True


def keeps_a_pool() -> object:
    """
    Keep a process pool open and never end it.
    """
    pool = multiprocessing.get_context("fork").Pool(1)
    kept.append(pool)
    return pool.apply(abs, [-1]) == 1


def keeps_a_forked_process() -> object:
    """
    Keep a forked process that is not a daemon, so that a program would wait for it.
    """
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[STAYS_SECONDS])
    process.start()
    kept.append(process)
    return True


def keeps_a_process_executor() -> object:
    """
    Keep a process executor open with one of its processes busy.
    """
    context = multiprocessing.get_context("fork")
    executor = concurrent.futures.ProcessPoolExecutor(2, context)
    executor.submit(time.sleep, STAYS_SECONDS)
    kept.append(executor)
    return executor.submit(abs, -1).result() == 1


def spawns() -> object:
    """
    Spawn a new Python process.
    """
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    return process.exitcode == 0


def uses_a_fork_server() -> object:
    """
    Use a fork server, the default of Python 3.14 and later.
    """
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()
    return process.exitcode == 0


def runs_programs() -> object:
    """
    Run programs, one of them with a `preexec_fn`, for which Python forks.
    """
    plain = subprocess.run(["true"])
    prepared = subprocess.run(["sh", "-c", "kill -TERM $$"], preexec_fn=os.setsid)
    return (plain.returncode, prepared.returncode) == (0, -signal.SIGTERM)


# Threads


def keeps_a_thread() -> object:
    """
    Keep a thread that is not a daemon, so that a program would wait for it.
    """
    threading.Thread(target=time.sleep, args=[STAYS_SECONDS]).start()
    return True


def keeps_an_executor() -> object:
    """
    Keep a thread executor busy; a program would wait for its threads.
    """
    executor = concurrent.futures.ThreadPoolExecutor()
    executor.submit(time.sleep, STAYS_SECONDS)
    return True


def forks_in_a_thread() -> object:
    """
    Fork in a thread other than the handler's.
    """
    with concurrent.futures.ThreadPoolExecutor() as executor:
        return executor.submit(ends_a_forked_process).result()


def exits_in_a_thread() -> object:
    """
    Call `sys.exit()` in a thread, which ends only that thread.
    """
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    return True


# What belongs to the process


def takes_signals() -> object:
    """
    Install signal handlers where Python allows it: in the main thread.
    """
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda number, frame: None)
    return True


def registers_a_slow_end() -> object:
    """
    Register a slow function to run at exit.
    """
    atexit.register(time.sleep, STAYS_SECONDS)
    return True


def changes_the_folder() -> object:
    """
    Change the working directory and do not change back.
    """
    os.chdir("/")
    return True


def keeps_state() -> object:
    """
    Keep state in a module.
    """
    kept.append(RESULT)
    return RESULT in kept


def replaces_streams() -> object:
    """
    Replace the standard streams and never restore them.
    """
    sys.stdout = open(os.devnull, "w")
    sys.stdout.write("to nobody")
    return True


def closes_streams() -> object:
    """
    Close the standard streams, as daemons do.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    print("to anybody")  # noqa: T201 - that is the point
    return True


def leaves_a_context_variable() -> object:
    """
    Set a context variable, and find none set by other handlers.
    """
    found = customer.get(None)
    customer.set("one of this attempt")
    return found is None


def leaves_another_context_variable() -> object:
    """
    Set the same variable as `leaves_a_context_variable`.
    """
    return leaves_a_context_variable()


def keeps_big_exceptions() -> object:
    """
    Keep exceptions in reference cycles of three megabytes each: garbage that only a collection
    frees.
    """
    for _ in range(200):
        _keep_a_big_exception()
    return True


def _keep_a_big_exception() -> None:
    large = b"x" * (3 << 20)
    try:
        raise ValueError(len(large))
    except ValueError as error:
        mine = error  # its traceback holds this frame, which holds it
        assert mine.args


# Event loops


async def uses_threads_of_the_loop() -> object:
    """
    Use more threads of the loop than Python's default, if the loop is the worker's.
    """
    count = 20 if ISOLATION == "loop" else 2
    together = threading.Barrier(count)
    waiting = [asyncio.to_thread(together.wait, 60) for _ in range(count)]
    return len(await asyncio.gather(*waiting)) == count


async def keeps_a_thread_of_the_loop() -> object:
    """
    Start a thread of the loop and do not wait for it.
    """
    loop = asyncio.get_running_loop()
    kept.append(loop.run_in_executor(None, time.sleep, STAYS_SECONDS))
    if ISOLATION != "loop":
        # Each handler then has its own loop, which ends with it and waits for its threads.
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor())
    return True


async def keeps_a_stubborn_task() -> object:
    """
    Keep a task that ignores cancellation; a loop that ends with its handler would never end.
    """
    if ISOLATION != "loop":
        return True
    kept.append(asyncio.get_running_loop().create_task(_take_no_cancellation()))
    await asyncio.sleep(0)
    return True


async def _take_no_cancellation() -> None:
    until = time.monotonic() + STAYS_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1)


async def stops_the_loop() -> object:
    """
    Stop the loop, which also runs the other handlers.
    """
    if ISOLATION == "loop":
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
    return True


async def takes_signals_of_the_loop() -> object:
    """
    Install signal handlers on the loop, as standalone servers do.
    """
    with contextlib.suppress(ValueError, RuntimeError):  # only where the main thread's loop is
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, int)
    return True


async def raises_in_a_callback() -> object:
    """
    Raise in a callback, where nothing catches the error.
    """
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: None)
    loop.call_soon(_raise)
    await asyncio.sleep(0.01)
    loop.set_exception_handler(None)
    return True


def _raise() -> None:
    raise RuntimeError("in a callback")


HABITS: dict[str, Callable[[], object] | Callable[[], Coroutine[Any, Any, object]]] = {
    habit.__name__.replace("_", "-"): habit
    for habit in (
        *(forks, forks_and_returns_twice, forks_and_stays, forks_in_a_thread),
        *(ends_a_forked_process, interrupts_a_forked_process, keeps_a_forked_process),
        *(uses_pools, leaves_a_busy_pool, keeps_a_pool, keeps_a_process_executor),
        *(spawns, uses_a_fork_server, runs_programs),
        *(keeps_a_thread, keeps_an_executor, exits_in_a_thread),
        *(takes_signals, registers_a_slow_end, changes_the_folder, keeps_state),
        *(closes_streams, replaces_streams, keeps_big_exceptions),
        *(leaves_a_context_variable, leaves_another_context_variable),
        *(uses_threads_of_the_loop, keeps_a_thread_of_the_loop, keeps_a_stubborn_task),
        *(stops_the_loop, takes_signals_of_the_loop, raises_in_a_callback),
    )
}


def _offer(name: str, habit: Callable[[], Any]) -> None:
    is_async = asyncio.iscoroutinefunction(habit)

    async def on_a_loop() -> str:
        done = habit()
        return _said(await done if is_async else done)

    def off_it() -> str:
        return _said(asyncio.run(habit()) if is_async else habit())

    on_loop = ISOLATION == "loop" or (ISOLATION == "process" and is_async)
    run = on_a_loop if on_loop else off_it
    handler(f"{name}.{ISOLATION}", isolation=ISOLATION, max_attempts=1, timeout_seconds=60)(run)


def _said(done: object) -> str:
    return RESULT if done is True else repr(done)


for each, habit in HABITS.items():
    _offer(each, habit)


@handler(f"neighbour.{ISOLATION}", isolation="loop", max_attempts=1)
async def neighbour(context: Context) -> None:
    """
    Run concurrently with every habit until the worker stops.
    """
    while not context.cancelled:  # noqa: ASYNC110 - many turns of the loop are the point
        await asyncio.sleep(0.05)


@handler(f"rest.{ISOLATION}", isolation="loop", max_attempts=1)
async def rest() -> None:
    """
    Wait until the worker has reinstalled its signal handlers, which its loop does before this ends.
    """
    await asyncio.sleep(2 * CHECK_SECONDS)


@handler(f"stubborn.{ISOLATION}", isolation="process" if ISOLATION == "process" else "thread")
def stubborn(context: Context) -> None:
    """
    Keep running when the worker stops.
    """
    time.sleep(STAYS_SECONDS)
