"""
The nursery of child processes: they run the code loaded at startup, and no task is charged for what
the machine lacks.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import pytest

from asyncflow.domain.outcome import Completed, Crashed, Outcome
from asyncflow.errors import ChildNotStarted, HandlerError
from asyncflow.handlers import DEFAULT_REGISTRY, Handler
from asyncflow.worker.isolation.isolation import Isolation
from asyncflow.worker.isolation.nursery import Nursery
from asyncflow.worker.isolation.pool import ChildPool
from asyncflow.worker.isolation.run import Run
from tests.worker import odd_handlers
from tests.worker.test_isolation import Begun, a_context, begin, run

assert odd_handlers

TASKS = """
import asyncflow

@asyncflow.handler(isolation="process")
def answer():
    return {answer!r}
"""

# A forked process would share an open socket, among other things.
NO_FORK = "import os, socket, sys, time\nHELD = socket.socketpair()\nIS_CHILD = len(sys.argv) > 2\n"

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux only")


def in_child(name: str) -> Handler:
    """
    A handler as seen by a worker that runs it in a child, which has the actual function.
    """
    return Handler(name=name, function=lambda: None, isolation="process")


@asynccontextmanager
async def an_isolation(*modules: Path | str) -> AsyncIterator[tuple[Isolation, Nursery]]:
    """
    An isolation whose children load `modules`, and their nursery.
    """
    async with Nursery([str(module) for module in modules]) as nursery:
        isolation = Isolation(slots=2, cancel_grace_seconds=60, nursery=nursery)
        try:
            yield isolation, nursery
        finally:
            await isolation.close()


async def not_entered(isolation: Isolation, handler: Handler) -> None:
    """
    Run an attempt that cannot begin, and check that its task is released.
    """
    _, ended = begin(isolation, handler, a_context())
    assert await asyncio.wait_for(ended, 30) is None
    assert isolation.shortage.lasts


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


async def test_a_child_finds_what_a_module_declares_by_a_call(tmp_path: Path) -> None:
    """
    A child finds a handler whose function is another module's, or hidden by a decorator without
    `__wrapped__`.
    """
    written(tmp_path / "heavy_library.py", "def heavy(): return 'heavy'\n")
    tasks = written(
        tmp_path / "tasks.py",
        "import asyncflow, functools, heavy_library\n"
        "def bare(f):\n    def inner(): return f()\n    return inner\n"
        "asyncflow.handler('heavy', isolation='process')(heavy_library.heavy)\n"
        "asyncflow.handler('bare', isolation='process')(bare(heavy_library.heavy))\n",
    )

    async with an_isolation(tasks) as (isolation, _):
        outcomes = [await run(isolation, in_child(name)) for name in ("heavy", "bare")]

    assert [Completed('"heavy"')] * 2 == outcomes


@pytest.mark.parametrize("later", [TASKS.format(answer="new"), "def half_writ(", None])
@only_linux
async def test_children_run_what_was_loaded_at_the_start(tmp_path: Path, later: str | None) -> None:
    """
    Children run the code loaded at startup, whether the file has since been edited, half written or
    deleted.
    """
    tasks = written(tmp_path / "tasks.py", TASKS.format(answer="old"))

    async with an_isolation(tasks) as (isolation, nursery):
        await nursery.start()
        if later is None:
            tasks.unlink()
        else:
            tasks.write_text(later)
        outcome = await run(isolation, in_child("answer"))

    assert Completed('"old"') == outcome


async def test_a_child_that_imports_by_itself_refuses_files_that_have_changed(
    tmp_path: Path,
) -> None:
    """
    A child that has to import changed files refuses and its task is released: one worker never runs
    two versions of a handler.
    """
    tasks = written(tmp_path / "tasks.py", NO_FORK + TASKS.format(answer="old"))

    async with an_isolation(tasks) as (isolation, nursery):
        first = await run(isolation, in_child("answer"))
        await isolation.children.close()
        tasks.write_text(NO_FORK + TASKS.format(answer="quite new"))
        with pytest.raises(
            ChildNotStarted, match=r"tasks\.py has changed since the worker started"
        ):
            await nursery.child()
        await not_entered(isolation, in_child("answer"))

    assert Completed('"old"') == first


async def test_what_an_import_takes_is_no_part_of_an_attempt(tmp_path: Path) -> None:
    """
    A handler whose import takes longer than its timeout does run.
    """
    slow = NO_FORK + "time.sleep(0.5)\n" + TASKS.format(answer="there")
    tasks = written(tmp_path / "tasks.py", slow)

    async with an_isolation(tasks) as (isolation, _):
        context = a_context(timeout_seconds=0.4)
        outcome = await run(isolation, in_child("answer"), context=context)

    assert Completed('"there"') == outcome


async def test_a_module_that_cannot_be_loaded_is_told_at_the_start(tmp_path: Path) -> None:
    """
    A module that cannot be loaded fails startup, with its author's traceback, as in the worker
    itself.
    """
    tasks = written(tmp_path / "tasks.py", "1 / 0")

    async with an_isolation(tasks) as (_, nursery):
        with pytest.raises(HandlerError, match="'tasks' failed while it was imported"):
            await nursery.start()


async def test_a_module_that_ends_its_process_is_told_at_the_start(tmp_path: Path) -> None:
    """
    A module that ends its process fails startup and is named, although it raised nothing.
    """
    tasks = written(tmp_path / "tasks.py", "import os; os._exit(3)")

    async with an_isolation(tasks) as (_, nursery):
        with pytest.raises(HandlerError, match=r"ended while it loaded .*tasks\.py'"):
            await nursery.start()


async def test_a_handler_that_only_the_worker_has_is_told_at_the_start(tmp_path: Path) -> None:
    """
    A handler that only the worker has fails startup, rather than each of its tasks.
    """
    tasks = written(tmp_path / "tasks.py", TASKS.format(answer=1))

    async with Nursery([str(tasks)], handlers=["answer", "question"]) as nursery:
        with pytest.raises(HandlerError, match="missing in its child process: question"):
            await nursery.start()


async def test_a_child_that_cannot_import_says_what(tmp_path: Path) -> None:
    """
    A child that cannot import reports what failed, and its task is released.
    """
    broken = NO_FORK + "if IS_CHILD: raise RuntimeError('no licence')\n" + TASKS.format(answer=1)
    tasks = written(tmp_path / "tasks.py", broken)

    async with an_isolation(tasks) as (isolation, nursery):
        with pytest.raises(ChildNotStarted, match=r"(?s)'tasks' failed .*no licence"):
            await nursery.child()
        await not_entered(isolation, in_child("answer"))


async def test_a_child_that_never_gets_ready_is_given_up_and_names_its_import(
    tmp_path: Path,
) -> None:
    """
    Startup of a child has its own timeout, and the error names the import that hangs.
    """
    stuck = NO_FORK + "if IS_CHILD: time.sleep(3600)\n" + TASKS.format(answer=1)
    tasks = written(tmp_path / "tasks.py", stuck)

    async with an_isolation(tasks) as (_, nursery):
        await nursery.start()
        for seconds in (1.0, 4.0, 16.0, 64.0):  # until the machine is fast enough to get so far
            nursery.start_seconds = seconds
            with pytest.raises(ChildNotStarted) as refusal:
                await nursery.child()
            if str(tasks) in refusal.value.reason:
                break

    assert f"it was not ready after {seconds:g} s, and loaded '{tasks}'." == refusal.value.reason


@only_linux
async def test_a_child_dies_of_what_it_did_although_its_nursery_forked_it(
    tmp_path: Path,
) -> None:
    """
    The nursery, as its parent, tells the worker how a child died, and the next child works.
    """
    text = "import os, asyncflow\n@asyncflow.handler(isolation='process')\n"
    tasks = written(tmp_path / "tasks.py", text + "def leave(status: int): os._exit(status)\n")

    async with an_isolation(tasks) as (isolation, _):
        outcomes = [
            await run(isolation, in_child_with("leave"), f'{{"status": {status}}}')
            for status in (3, 4)
        ]

    assert all(isinstance(outcome, Crashed) for outcome in outcomes)
    messages = [outcome.failure.message for outcome in outcomes if isinstance(outcome, Crashed)]
    assert ["3", "4"] == [message.partition("status ")[2][0] for message in messages]


def in_child_with(name: str) -> Handler:
    return Handler(name=name, function=lambda **rest: None, isolation="process")


async def test_a_nursery_that_is_killed_takes_its_children_along_and_is_replaced() -> None:
    """
    When the nursery is killed its children's attempts crash, as if each had been killed; later
    attempts are unaffected.
    """
    async with an_isolation("tests.worker.odd_handlers") as (isolation, nursery):
        begun = Begun()
        _, ended = begin(isolation, the("poll.process"), a_context(on_progress=begun))
        await begun.message()
        os.kill(pid_of(nursery), signal.SIGKILL)
        outcome = await asyncio.wait_for(ended, 30)
        later = await run(isolation, the("number.process"))

    assert isinstance(outcome, Crashed)
    assert Completed("1.5") == later


def the(name: str) -> Handler:
    found = DEFAULT_REGISTRY.get(name)
    assert found is not None
    return found


def pid_of(nursery: Nursery) -> int:
    (process,) = [
        child
        for child in psutil.Process().children()
        if "asyncflow.worker.isolation.nursery_process" in child.cmdline()
    ]
    return process.pid


async def test_what_the_worker_lacks_is_not_charged_to_a_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Without a free file descriptor an attempt does not begin and is not charged; with one, the next
    begins.
    """
    async with an_isolation("tests.worker.odd_handlers") as (isolation, nursery):
        await nursery.start()

        def refuse(*_: object) -> None:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as nothing_left:
            nothing_left.setattr("asyncflow.worker.isolation.nursery.socket.socketpair", refuse)
            await not_entered(isolation, the("number.process"))
        outcome = await run(isolation, the("number.process"))

    assert Completed("1.5") == outcome


@contextmanager
def no_free_descriptor(pid: int) -> Iterator[None]:
    """
    Leave a process no free file descriptor.
    """
    process = psutil.Process(pid)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    taken = {int(descriptor.name) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
    free = min(set(range(len(taken) + 1)) - taken)
    process.rlimit(psutil.RLIMIT_NOFILE, (free, before[1]))
    try:
        yield
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, before)


@only_linux
async def test_what_the_nursery_lacks_is_not_charged_to_a_task() -> None:
    """
    What the nursery lacks is charged to no task, and does not mix up children and attempts.
    """
    async with an_isolation("tests.worker.odd_handlers") as (isolation, nursery):
        await nursery.start()
        with no_free_descriptor(pid_of(nursery)):
            await not_entered(isolation, the("number.process"))
            await not_entered(isolation, the("number.process"))
        outcomes: list[Outcome] = [await run(isolation, the("number.process")) for _ in range(2)]

    assert [Completed("1.5")] * 2 == outcomes


async def test_idle_children_leave() -> None:
    """
    Idle children exit and free their memory; busy ones stay.
    """
    async with Nursery(["tests.worker.odd_handlers"]) as nursery:
        children = ChildPool(nursery, idle_max=2, tasks_max=9, idle_seconds=0.05)
        lent, idle = await children.lend(), await children.lend()
        children.take_back(idle)
        await asyncio.wait_for(asyncio.shield(idle.reaper), 30)

        assert psutil.pid_exists(lent.pid) and lent.is_alive
        assert idle is not await children.lend()
        await children.close()


@pytest.mark.parametrize("prefix", ["", NO_FORK], ids=["forked", "by itself"])
async def test_children_and_nursery_end_with_their_connection(tmp_path: Path, prefix: str) -> None:
    """
    However they were started, children and nursery exit when their connection closes.
    """
    tasks = written(
        tmp_path / "tasks.py",
        prefix + "import os, asyncflow\n@asyncflow.handler(isolation='process')\n"
        "def pids(): return [os.getpid(), os.getppid()]\n",
    )

    async with an_isolation(tasks) as (isolation, nursery):
        outcome = await run(isolation, in_child("pids"))
        assert isinstance(outcome, Completed)
        child, parent = map(int, outcome.result.strip("[]").split(","))
        assert pid_of(nursery) == parent

    assert not psutil.pid_exists(child)
    assert not psutil.pid_exists(parent)


async def test_an_attempt_that_is_stopped_while_its_child_starts_is_not_begun(
    tmp_path: Path,
) -> None:
    """
    An attempt stopped while its child starts ends without waiting for it.
    """
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    waits = NO_FORK + f"if IS_CHILD: open({str(gate)!r}).read()\n" + TASKS.format(answer=1)
    tasks = written(tmp_path / "tasks.py", waits)

    async with an_isolation(tasks) as (isolation, nursery):
        await nursery.start()
        stopping: tuple[Run, asyncio.Future[Outcome | None]]
        stopping = begin(isolation, in_child("answer"), a_context())
        await asyncio.sleep(0)  # The attempt requests a child.
        stopping[0].interrupt()
        assert await asyncio.wait_for(stopping[1], 30) is None
        (await asyncio.to_thread(gate.open, "w")).close()


FORKING_WORKER = """
import asyncio, os, sys, time
sys.path[:] = {path!r}
from asyncflow.worker.isolation.nursery import Nursery

async def main():
    nursery = Nursery([])
    await nursery.start()
    print(nursery._process.pid, flush=True)
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(0)

asyncio.run(main())
"""


@only_linux
async def test_a_nursery_ends_with_its_worker_though_a_fork_of_that_lives_on() -> None:
    """
    A nursery exits with its worker even if a fork, such as a pool's process, holds the connection
    open.
    """
    code = FORKING_WORKER.format(path=sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    ) as worker:
        assert worker.stdout is not None
        nursery = psutil.Process(int(worker.stdout.readline()))
        try:
            await asyncio.to_thread(nursery.wait, 30)
        finally:
            os.killpg(worker.pid, signal.SIGKILL)
