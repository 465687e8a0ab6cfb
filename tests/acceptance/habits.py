"""
What people do inside handlers, in the isolation that the environment names.

Each habit does something that is fine in a program of its own, and may leave something behind.
Run as `<name>.<isolation>` it comes to `RESULT`; anything else is what it did to itself.
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
    And waits for the child, which ends by itself.
    """
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def forks_and_returns_twice() -> object:
    """
    The child goes on where the parent does, into code of ours.
    """
    os.fork()
    return True


def forks_and_stays() -> object:
    """
    A child that nobody waits for, and that outlives the worker.
    """
    if os.fork() == 0:
        os.closerange(0, 256)  # Nor does a test wait for what it might say, also by a logger.
        time.sleep(STAYS_SECONDS)
        os._exit(0)
    return True


def ends_a_forked_process() -> object:
    """
    By SIGTERM, which must reach the child and nobody else.
    """
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[STAYS_SECONDS])
    process.start()
    process.terminate()
    process.join()
    return process.exitcode == -signal.SIGTERM


def interrupts_a_forked_process() -> object:
    """
    As Ctrl-C does.
    """
    pid = os.fork()
    if pid == 0:
        try:
            time.sleep(STAYS_SECONDS)
        finally:
            os._exit(3)
    time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    # With or without Python's own handler, which child processes of workers have not.
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (3, -signal.SIGINT)


def uses_pools() -> object:
    """
    Three in a row; leaving one ends its processes by SIGTERM.
    """
    for _ in range(3):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            if pool.map(abs, [-1, -2]) != [1, 2]:
                return "wrong"
    return True


def leaves_a_busy_pool() -> object:
    """
    While its processes work.
    """
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.apply_async(time.sleep, [STAYS_SECONDS])
        pool.apply(abs, [-1])
    return True


def keeps_a_pool() -> object:
    """
    Never ends it.
    """
    pool = multiprocessing.get_context("fork").Pool(1)
    kept.append(pool)
    return pool.apply(abs, [-1]) == 1


def keeps_a_forked_process() -> object:
    """
    Not a daemon: a program would wait for it.
    """
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[STAYS_SECONDS])
    process.start()
    kept.append(process)
    return True


def keeps_a_process_executor() -> object:
    """
    One of its processes is busy.
    """
    context = multiprocessing.get_context("fork")
    executor = concurrent.futures.ProcessPoolExecutor(2, context)
    executor.submit(time.sleep, STAYS_SECONDS)
    kept.append(executor)
    return executor.submit(abs, -1).result() == 1


def spawns() -> object:
    """
    A new Python.
    """
    process = multiprocessing.get_context("spawn").Process(target=os.getpid)
    process.start()
    process.join()
    return process.exitcode == 0


def uses_a_fork_server() -> object:
    """
    As Python does by itself from 3.14 on.
    """
    process = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    process.start()
    process.join()
    return process.exitcode == 0


def runs_programs() -> object:
    """
    One with a function before it, for which Python forks.
    """
    plain = subprocess.run(["true"])
    prepared = subprocess.run(["sh", "-c", "kill -TERM $$"], preexec_fn=os.setsid)
    return (plain.returncode, prepared.returncode) == (0, -signal.SIGTERM)


# Threads


def keeps_a_thread() -> object:
    """
    Not a daemon: a program would wait for it.
    """
    threading.Thread(target=time.sleep, args=[STAYS_SECONDS]).start()
    return True


def keeps_an_executor() -> object:
    """
    A program would wait for what runs there.
    """
    executor = concurrent.futures.ThreadPoolExecutor()
    executor.submit(time.sleep, STAYS_SECONDS)
    return True


def forks_in_a_thread() -> object:
    """
    Beside the one that the handler runs in.
    """
    with concurrent.futures.ThreadPoolExecutor() as executor:
        return executor.submit(ends_a_forked_process).result()


def exits_in_a_thread() -> object:
    """
    Which ends the thread.
    """
    thread = threading.Thread(target=sys.exit)
    thread.start()
    thread.join()
    return True


# What belongs to the process


def takes_signals() -> object:
    """
    Where it may: in the main thread.
    """
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, lambda number, frame: None)
    return True


def registers_a_slow_end() -> object:
    """
    For the end of the program.
    """
    atexit.register(time.sleep, STAYS_SECONDS)
    return True


def changes_the_folder() -> object:
    """
    And does not go back.
    """
    os.chdir("/")
    return True


def keeps_state() -> object:
    """
    In a module.
    """
    kept.append(RESULT)
    return RESULT in kept


def replaces_streams() -> object:
    """
    Never puts them back.
    """
    sys.stdout = open(os.devnull, "w")
    sys.stdout.write("to nobody")
    return True


def closes_streams() -> object:
    """
    As programs do that want to be left alone.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.close()
    print("to anybody")  # noqa: T201 - that is the point
    return True


def leaves_a_context_variable() -> object:
    """
    And finds none of those that others left.
    """
    found = customer.get(None)
    customer.set("one of this attempt")
    return found is None


def leaves_another_context_variable() -> object:
    """
    The same one.
    """
    return leaves_a_context_variable()


def keeps_big_exceptions() -> object:
    """
    Each with itself and with three megabytes: garbage that only a collection finds.
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
    More than Python has by default, if the loop is the worker's.
    """
    count = 20 if ISOLATION == "loop" else 2
    together = threading.Barrier(count)
    waiting = [asyncio.to_thread(together.wait, 60) for _ in range(count)]
    return len(await asyncio.gather(*waiting)) == count


async def keeps_a_thread_of_the_loop() -> object:
    """
    Does not wait for it.
    """
    loop = asyncio.get_running_loop()
    kept.append(loop.run_in_executor(None, time.sleep, STAYS_SECONDS))
    if ISOLATION != "loop":
        # Each handler has a loop of its own then, which ends with it and waits for its threads.
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor())
    return True


async def keeps_a_stubborn_task() -> object:
    """
    One that takes no cancellation. A loop that ends with its handler would never end.
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
    Which runs the others, too.
    """
    if ISOLATION == "loop":
        asyncio.get_running_loop().stop()
        await asyncio.sleep(0.01)
    return True


async def takes_signals_of_the_loop() -> object:
    """
    As servers do that are made to run alone.
    """
    with contextlib.suppress(ValueError, RuntimeError):  # only where the main thread's loop is
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, int)
    return True


async def raises_in_a_callback() -> object:
    """
    Where nobody catches it.
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
    Run next to all of them until the worker stops.
    """
    while not context.cancelled:  # noqa: ASYNC110 - many turns of the loop are the point
        await asyncio.sleep(0.05)


@handler(f"rest.{ISOLATION}", isolation="loop", max_attempts=1)
async def rest() -> None:
    """
    Until the worker has taken its signals back, which its loop does before this ends.
    """
    await asyncio.sleep(2 * CHECK_SECONDS)


@handler(f"stubborn.{ISOLATION}", isolation="process" if ISOLATION == "process" else "thread")
def stubborn(context: Context) -> None:
    """
    Run when the worker stops, and take no notice of that.
    """
    time.sleep(STAYS_SECONDS)
