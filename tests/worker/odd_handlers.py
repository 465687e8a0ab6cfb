"""
Handlers that return, raise and do everything a handler may; imported by tests and children.
"""

# mypy: allow-untyped-calls
# Everything wrong here is wrong on purpose.

import asyncio
import ctypes
import dataclasses
import datetime
import decimal
import enum
import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextvars import ContextVar

import pydantic
import structlog

from asyncflow.errors import Reject, Retry
from asyncflow.handlers import Context, current_context, handler


class Colour(enum.Enum):
    RED = "red"


class Size(enum.StrEnum):
    BIG = "big"


@dataclasses.dataclass
class Point:
    x: int
    at: datetime.date


class Model(pydantic.BaseModel):
    id: uuid.UUID
    price: decimal.Decimal


class OddError(Exception):
    pass


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError("no")

    __repr__ = __str__


class HostileError(Exception):
    def __str__(self):
        raise KeyboardInterrupt

    __repr__ = __str__


class WordlessError(Exception):
    def __str__(self):
        return 7  # noqa: PLE0307 - that is the point


class UnpicklableError(Exception):
    def __init__(self):
        self.lock = threading.Lock()
        super().__init__("locked")


class UnfinishedRetryError(Retry):
    # Its author forgot to call `super().__init__`.
    def __init__(self, who):
        self.who = who


class UnfinishedRejectError(Reject):
    def __init__(self, who):
        self.who = who


class SpeechlessRetryError(Retry):
    def __str__(self):
        raise RuntimeError("no")


class OverwrittenRetryError(Retry):
    def __init__(self, after_seconds):
        super().__init__("later")
        self.after_seconds = after_seconds


class IndivisibleError(ExceptionGroup):
    def derive(self, exceptions):
        raise RuntimeError("no")


class HomelessKind(type):
    @property
    def __module__(cls):  # type: ignore[override]
        raise KeyboardInterrupt


class NumberedKind(type):
    @property
    def __module__(cls):  # type: ignore[override]
        return 7


class HomelessError(Exception, metaclass=HomelessKind):
    pass


class NumberedError(Exception, metaclass=NumberedKind):
    pass


class MaskedError(Exception):
    @property  # type: ignore[misc]
    def __class__(self):
        raise KeyboardInterrupt


LongNamedError = type("E" * 100_000, (Exception,), {})
OddlyNamedError = type("OddlyNamedError", (Exception,), {"__qualname__": "a\0b\ud800"})
OddlyNamed = type("OddlyNamed", (), {"__qualname__": "a\0b\ud800" * 10_000})


class Liar(dict[str, int]):
    def items(self):
        raise ConnectionError("no items")


class Quitter(pydantic.BaseModel):
    @pydantic.model_serializer
    def leave(self):
        sys.exit(3)


def stopping_half_way():
    yield 1
    raise ValueError("half way")


async def items_to_await():
    yield 1


def raise_(error):
    raise error


def nested(depth):
    value: list[object] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def circle():
    value: list[object] = []
    value.append(value)
    return value


def recurse(n=0):
    return recurse(n + 1)


def circular_cause():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def long_chain():
    error = ValueError("0")
    for n in range(1, 3_000):
        following = ValueError(str(n))
        following.__cause__ = error
        error = following
    raise error


async def forgotten():
    return 1


MIB = 1 << 20

RETURNS = {
    "nothing": (lambda: None, "null"),
    "number": (lambda: 1.5, "1.5"),
    "text": (lambda: "ü€😀", '"ü€😀"'),
    "object": (lambda: {"a": [1, True, None]}, '{"a":[1,true,null]}'),
    "nul": (lambda: {"a\0": "b\0c"}, '{"a\ufffd":"b\ufffdc"}'),
    "backslash": (lambda: "\\u0000", '"\\\\u0000"'),
    "surrogate": (lambda: "a\ud800b\udc00", '"a\ufffdb\ufffd"'),
    "surrogates that belong together": (lambda: "\ud83d\ude00", '"😀"'),
    "keys": (
        lambda: {None: 1, True: 2, 1.5: 3, 4: 5, "caf\udce9.txt": 6},
        '{"null":1,"true":2,"1.5":3,"4":5,"caf\ufffd.txt":6}',
    ),
    "keys beside what is not plain": (
        lambda: {None: {1}, True: 2, 1.5: 3, 4: 5, "caf\udce9.txt": datetime.date(2026, 1, 2)},
        '{"null":[1],"true":2,"1.5":3,"4":5,"caf\ufffd.txt":"2026-01-02"}',
    ),
    "keys in a dataclass": (
        lambda: Point({None: 1, "caf\udce9": 2}, datetime.date(2026, 1, 2)),  # type: ignore[arg-type]
        '{"x":{"null":1,"caf\ufffd":2},"at":"2026-01-02"}',
    ),
    "keys that are not plain": (
        lambda: {uuid.UUID(int=1): 1, datetime.date(2026, 1, 2): {Colour.RED: (1, 2)}},
        '{"00000000-0000-0000-0000-000000000001":1,"2026-01-02":{"red":[1,2]}}',
    ),
    "a generator among others": (
        lambda: [{1}, (n for n in range(3)), (4, {"five": [{6}]})],
        '[[1],[0,1,2],[4,{"five":[[6]]}]]',
    ),
    "date": (lambda: datetime.date(2026, 1, 2), '"2026-01-02"'),
    "uuid": (lambda: uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
    "decimal": (lambda: decimal.Decimal("1.10"), '"1.10"'),
    "enum": (lambda: Colour.RED, '"red"'),
    "string enum": (lambda: {"size": Size.BIG}, '{"size":"big"}'),
    "dataclass": (lambda: Point(1, datetime.date(2026, 1, 2)), '{"x":1,"at":"2026-01-02"}'),
    "model": (
        lambda: [Model(id=uuid.UUID(int=2), price=decimal.Decimal("0.5"))],
        '[{"id":"00000000-0000-0000-0000-000000000002","price":"0.5"}]',
    ),
    "set": (lambda: {1}, "[1]"),
    "bytes": ("é".encode, '"é"'),
    "deep": (lambda: nested(500), "[" * 500 + "]" * 500),
    "many objects": (lambda: [{}] * 1_000, "[" + ",".join(["{}"] * 1_000) + "]"),
    "as large as allowed": (lambda: "x" * (MIB - 2), '"' + "x" * (MIB - 2) + '"'),
    "a generator": (lambda: (n for n in range(3)), "[0,1,2]"),
    "four thousand digits": (lambda: 10**4_000, "1" + "0" * 4_000),
    "the current context": (lambda: current_context().attempt, "1"),
}

UNSTORABLE = {
    "nan": (lambda: {"a": float("nan")}, "InvalidResult"),
    "infinity": (lambda: [float("inf")], "InvalidResult"),
    "nan in a dataclass": (
        lambda: Point(float("nan"), None),  # type: ignore[arg-type]
        "InvalidResult",
    ),
    "circle": (circle, "InvalidResult"),
    "too deep": (lambda: nested(700), "InvalidResult"),
    "much too deep": (lambda: nested(100_000), "InvalidResult"),
    "bytes that are no text": (lambda: b"\xff", "InvalidResult"),
    "an object": (object, "InvalidResult"),
    "a lock": (lambda: {"lock": threading.Lock()}, "InvalidResult"),
    "a coroutine": (forgotten, "InvalidResult"),
    "a generator that fails": (stopping_half_way, "InvalidResult"),
    "an asynchronous generator": (items_to_await, "InvalidResult"),
    "a generator without end": (lambda: (n for n in itertools.count()), "ResultTooLarge"),
    "an object with a generator without end": (
        lambda: {"rows": (n for n in itertools.count())},
        "ResultTooLarge",
    ),
    "a serializer that quits": (Quitter, "InvalidResult"),
    "a type of an unstorable name": (OddlyNamed, "InvalidResult"),
    "too many digits": (lambda: 10**5000, "InvalidResult"),
    "one byte too large": (lambda: "x" * (MIB - 1), "ResultTooLarge"),
    "too large in bytes": (lambda: "€" * (MIB // 3), "ResultTooLarge"),
}

RAISES = {
    # what: (call, kind, message contains, retryable)
    "error": (lambda: raise_(ValueError("wrong")), "ValueError", "wrong", True),
    "own error": (lambda: raise_(OddError("odd")), f"{__name__}.OddError", "odd", True),
    "assertion": (lambda: raise_(AssertionError), "AssertionError", "", True),
    "timeout": (lambda: raise_(TimeoutError("slow")), "TimeoutError", "slow", True),
    "exit": (lambda: sys.exit(3), "SystemExit", "3", True),
    "exit without a word": (sys.exit, "SystemExit", "", True),
    "interrupt": (lambda: raise_(KeyboardInterrupt()), "KeyboardInterrupt", "", True),
    "generator exit": (lambda: raise_(GeneratorExit()), "GeneratorExit", "", True),
    "cancelled": (
        lambda: raise_(asyncio.CancelledError()),
        "asyncio.exceptions.CancelledError",
        "",
        True,
    ),
    "memory": (lambda: raise_(MemoryError()), "MemoryError", "", True),
    "recursion": (recurse, "RecursionError", "maximum recursion depth", True),
    "unprintable": (
        lambda: raise_(UnprintableError()),
        f"{__name__}.UnprintableError",
        "RuntimeError",
        True,
    ),
    "hostile": (
        lambda: raise_(HostileError()),
        f"{__name__}.HostileError",
        "KeyboardInterrupt",
        True,
    ),
    "wordless": (lambda: raise_(WordlessError()), f"{__name__}.WordlessError", "TypeError", True),
    "unpicklable": (
        lambda: raise_(UnpicklableError()),
        f"{__name__}.UnpicklableError",
        "locked",
        True,
    ),
    "long message": (lambda: raise_(ValueError("y" * 10_000_000)), "ValueError", "yyy…", True),
    "nul message": (lambda: raise_(ValueError("a\0b")), "ValueError", "a\ufffdb", True),
    "surrogate message": (lambda: raise_(ValueError("\udcff")), "ValueError", "\ufffd", True),
    "circular cause": (circular_cause, "ValueError", "first", True),
    "long chain": (long_chain, "ValueError", "2999", True),
    "group": (
        lambda: raise_(ExceptionGroup("two", [ValueError("a"), TypeError("b")])),
        "ExceptionGroup",
        "two",
        True,
    ),
    "base group": (
        lambda: raise_(BaseExceptionGroup("one", [KeyboardInterrupt()])),
        "BaseExceptionGroup",
        "one",
        True,
    ),
    "never to be retried": (lambda: raise_(KeyError("k")), "KeyError", "k", False),
    "never to be retried in a group": (
        lambda: raise_(ExceptionGroup("g", [KeyError("k"), ExceptionGroup("h", [KeyError("l")])])),
        "ExceptionGroup",
        "g",
        False,
    ),
    "sometimes to be retried in a group": (
        lambda: raise_(ExceptionGroup("g", [KeyError("k"), ValueError("v")])),
        "ExceptionGroup",
        "g",
        True,
    ),
    "retry": (lambda: raise_(Retry("busy")), "Retry", "busy", True),
    "retry in a group": (
        lambda: raise_(ExceptionGroup("g", [ExceptionGroup("h", [Retry("busy")])])),
        "Retry",
        "busy",
        True,
    ),
    "reject": (lambda: raise_(Reject("never")), "Reject", "never", False),
    "unfinished retry": (lambda: raise_(UnfinishedRetryError("me")), "Retry", "me", True),
    "unfinished reject": (lambda: raise_(UnfinishedRejectError("me")), "Reject", "me", False),
    "speechless retry": (lambda: raise_(SpeechlessRetryError()), "Retry", "RuntimeError", True),
    "retry at no time": (
        lambda: raise_(OverwrittenRetryError(float("nan"))),
        "Retry",
        "later",
        True,
    ),
    "retry in a word": (lambda: raise_(OverwrittenRetryError("soon")), "Retry", "later", True),
    "retry much too late": (lambda: raise_(OverwrittenRetryError(1e300)), "Retry", "later", True),
    "indivisible group": (
        lambda: raise_(IndivisibleError("g", [KeyError("k"), ValueError("v")])),
        f"{__name__}.IndivisibleError",
        "g",
        True,
    ),
    "homeless": (lambda: raise_(HomelessError("n")), "Exception", "n", True),
    "numbered": (lambda: raise_(NumberedError("n")), "7.NumberedError", "n", True),
    "masked": (lambda: raise_(MaskedError("m")), f"{__name__}.MaskedError", "m", True),
    "long name": (
        lambda: raise_(LongNamedError("n")),
        f"{__name__}.{'E' * (253 - len(__name__) - 1)}…",
        "n",
        True,
    ),
    "odd name": (lambda: raise_(OddlyNamedError("n")), f"{__name__}.a\ufffdb\ufffd", "n", True),
    "items that lie": (lambda: Liar(a=1), "ConnectionError", "no items", True),
}


def declare(what, call):
    name = what.replace(" ", "-")

    @handler(f"{name}.loop", never_retry=(LookupError,))
    async def in_loop():
        return call()

    @handler(f"{name}.thread", never_retry=(LookupError,))
    def in_thread():
        return call()

    @handler(f"{name}.process", isolation="process", never_retry=(LookupError,))
    def in_process():
        return call()

    @handler(f"{name}.process-async", isolation="process", never_retry=(LookupError,))
    async def in_process_async():
        return call()


for table in (RETURNS, UNSTORABLE, RAISES):
    for what, (call, *_) in table.items():
        declare(what, call)

declare("stop", lambda: raise_(StopIteration("early")))


@handler("exit-in-a-task.process-async", isolation="process")
async def exit_in_a_task_of_an_async_process():
    async def leave():
        sys.exit(3)

    await asyncio.gather(leave())


@handler("rows-without-end.process", isolation="process")
def rows_without_end_in_process(context: Context):
    context.progress(message="begun")
    return {"rows": (n for n in itertools.count() if n < 0)}


# Handlers that run until they are stopped. Each reports by its progress that it has begun.


@handler("wait.loop")
async def wait_in_loop(context: Context):
    context.progress(message="begun")
    await asyncio.get_running_loop().create_future()


@handler("wait.process-async", isolation="process")
async def wait_in_async_process(context: Context):
    context.progress(message="begun")
    await asyncio.get_running_loop().create_future()


@handler("poll.thread")
def poll_in_thread(context: Context):
    poll(context)


@handler("poll.process", isolation="process")
def poll_in_process(context: Context):
    poll(context)


def poll(context):
    context.progress(message="begun")
    while not context.cancelled:
        time.sleep(0.005)
    context.raise_if_cancelled()


@handler("shrug.loop")
async def shrug_in_loop(context: Context):
    context.progress(message="begun")
    try:
        await asyncio.get_running_loop().create_future()
    except asyncio.CancelledError:
        return "half"


@handler("shrug.thread")
def shrug_in_thread(context: Context):
    context.progress(message="begun")
    while not context.cancelled:
        time.sleep(0.005)
    return "half"


@handler("shrug.process", isolation="process")
def shrug_in_process(context: Context):
    return shrug_in_thread(context)


@handler("shrug.process-async", isolation="process")
async def shrug_in_async_process(context: Context):
    return await shrug_in_loop(context)


UNSTUCK = threading.Event()


@handler("ignore.loop")
async def ignore_in_loop(context: Context):
    context.progress(message="begun")
    while not UNSTUCK.is_set():
        try:
            await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            pass


@handler("ignore.thread")
def ignore_in_thread(context: Context):
    context.progress(message="begun")
    UNSTUCK.wait()


@handler("ignore.process", isolation="process")
def ignore_in_process(context: Context):
    context.progress(message="begun")
    while True:
        try:
            time.sleep(1_000)
        except BaseException:
            pass


@handler("hog.process", isolation="process")
def hog_the_lock_in_process(context: Context):
    # PyDLL keeps the GIL, so no other thread of the child runs any more.
    context.progress(message="begun")
    time.sleep(0.2)  # for the report to be sent
    ctypes.PyDLL(None).sleep(1_000)


@handler("late.thread")
def late_in_thread(context: Context):
    context.progress(message="begun")
    time.sleep(0.1)
    return "whole"


@handler("late.process", isolation="process")
def late_in_process(context: Context):
    return late_in_thread(context)


# What handlers do to their process.


@handler("leave.process", isolation="process")
def exit_in_process(status: int):
    os._exit(status)


@handler("signal.process", isolation="process")
def signal_in_process(number: int):
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


@handler("pid.process", isolation="process")
def pid_in_process():
    return os.getpid()


@handler("family.process", isolation="process")
def family_in_process(context: Context):
    program = subprocess.Popen(["sleep", "1000"])
    context.progress(message=f"{os.getpid()} {program.pid}")
    time.sleep(1_000)


@handler("fork.process", isolation="process")
def fork_in_process():
    pid = os.fork()
    if pid == 0:
        time.sleep(1_000)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@handler("grow.process", isolation="process", memory_bytes_max=64 * MIB)
def grow_in_process(context: Context):
    context.progress(message="begun")
    hold = bytearray(b"x" * (128 * MIB))
    time.sleep(1_000)
    return len(hold)


@handler("grow-a-program.process", isolation="process", memory_bytes_max=64 * MIB)
def grow_a_program_in_process():
    code = "x = b'x' * (128 << 20); import time; time.sleep(1000)"
    subprocess.run([sys.executable, "-c", code], check=False)


@handler("chat.process", isolation="process")
def chat_in_process(context: Context, times: int):
    for n in range(times):
        context.progress(n / times, f"step {n}")
    context.progress(1.0, "last")
    time.sleep(0.2)


@handler("describe.process", isolation="process")
def describe_in_process(context: Context):
    return {
        "task_id": context.task_id,
        "lease_id": context.lease_id,
        "tenant_id": context.tenant_id,
        "queue": context.queue,
        "attempt": context.attempt,
        "max_attempts": context.max_attempts,
        "remaining": context.remaining_seconds(),
    }


@handler("print.process", isolation="process")
def print_in_process():
    sys.stdout.write("to standard output\n")
    sys.stderr.write("to standard error\n")
    os.write(1, b"raw\n")


@handler("log.process", isolation="process")
def log_in_process(context: Context):
    context.logger.info("looked", at="stars")
    logging.getLogger("astronomy").info("counted %d", 7, extra={"at": "moons"})
    sys.stderr.close()
    context.logger.info("looked again", at="stars")


@handler("close.process", isolation="process")
def close_everything_in_process():
    os.closerange(3, 256)
    return "closed"


# What an attempt leaves in its context, and what the next one finds there.

TENANT: ContextVar[str] = ContextVar("tenant", default="nobody")
REGION: ContextVar[str] = ContextVar("region", default="unset")
REGION.set("set at import")


def mark() -> None:
    TENANT.set("mine")
    REGION.set("mine")
    structlog.contextvars.bind_contextvars(customer="mine")


def look() -> list[object]:
    return [TENANT.get(), REGION.get(), structlog.contextvars.get_contextvars()]


declare("mark", mark)
declare("look", look)


BALLAST_BYTES = 4 * MIB


class Ballast:
    alive = 0

    def __init__(self):
        self.content = b"x" * BALLAST_BYTES
        Ballast.alive += 1

    def __del__(self):
        Ballast.alive -= 1


def keep_its_error():
    gc.set_threshold(20_000, 20, 20)  # as in a worker
    ballast = Ballast()  # noqa: F841 - the traceback holds it
    try:
        raise ValueError("kept")
    except ValueError as error:
        kept = error  # noqa: F841 - it holds this frame, which holds it
    return Ballast.alive


declare("keep its error", keep_its_error)
