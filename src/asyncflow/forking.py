"""
What a process forked by a handler must not share with its AsyncFlow parent.

Handlers may fork, most often through `multiprocessing`. The child is a copy that would share with
its parent:

- the signal handlers, and the descriptor that wakes the event loop: the child would ignore a
  signal, and the parent would stop instead;
- the sockets: PostgreSQL would consider a killed worker alive for as long as its child lives;
- the event loop's epoll instance: a copied object that is closed in the child would be removed
  from it, and the parent would no longer be woken.

So a child starts with the signal handlers from before AsyncFlow, and with /dev/null in place of
those descriptors. They are not closed, because their owner may close the same number again when
it belongs to another file. Nothing is sent on the connections; they remain the parent's.

A fork in C code, without Python's `os.fork`, is not handled: such a child runs no code of
AsyncFlow, and a signal affects only the process it was sent to, see `stopping`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable
from weakref import WeakKeyDictionary

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Identity = tuple[int, int]
"""Device and inode: whether a descriptor still refers to the same file."""

_withheld: WeakKeyDictionary[object, dict[int, _Identity]] = WeakKeyDictionary()


class _Thread(threading.local):
    mask: Iterable[int] = ()


_forking = _Thread()
_copies: set[int] = set()
"""This process's id, if it is a forked child."""


def withhold(owner: object, *descriptors: int) -> None:
    """
    Keep these descriptors from forked children for as long as `owner` lives.
    """
    _withheld[owner] = {number: _identity(number) for number in descriptors}


def free_children() -> None:
    """
    Make processes that are forked from now on independent of this one.

    To be called once per process, before it handles any signal.
    """
    originals = {number: signal.getsignal(number) for number in SIGNALS}

    def hold_signals() -> None:
        # Python drops signals that arrive during a fork, and a child that is not yet independent
        # would pass them to its parent.
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def release_signals() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)

    def free_child() -> None:
        _copies.add(os.getpid())
        signal.set_wakeup_fd(-1)
        for number, original in originals.items():
            signal.signal(number, signal.SIG_DFL if original is None else original)
        if signal.getsignal(signal.SIGCHLD) is None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # set by the event loop
        _replace_withheld()
        release_signals()

    os.register_at_fork(
        before=hold_signals, after_in_parent=release_signals, after_in_child=free_child
    )


def end_copy() -> None:
    """
    Exit if this process is a forked child whose handler has returned: what follows is for the
    parent to do.
    """
    if _copies:
        os._exit(0)


def open_descriptors() -> set[int]:
    """
    The descriptors that are open now; empty where the system cannot list them.
    """
    try:
        listed = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        return set()
    return {number for number in listed if _is_open(number)}  # listing took one for itself


def _replace_withheld() -> None:
    nothing = None
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
    for descriptors in list(_withheld.values()):
        for number, identity in descriptors.items():
            with contextlib.suppress(OSError):  # it is closed
                if _identity(number) != identity:
                    continue
                if nothing is None:
                    os.close(number)
                else:
                    os.dup2(nothing, number, inheritable=False)
    if nothing is not None:
        os.close(nothing)


def _identity(number: int) -> _Identity:
    facts = os.fstat(number)
    return facts.st_dev, facts.st_ino


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
