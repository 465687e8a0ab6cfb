"""
What a forked process does not get from a process of ours.

Handlers may fork, most often by `multiprocessing`. The child is a copy that shares with its
parent what must not be shared:

- the parent's handlers for signals, and the descriptor that wakes its event loop: a signal to
  the child would be ignored there and stop the parent;
- our sockets: PostgreSQL would think a killed worker alive for as long as its child lives;
- the kernel's list of what the loop watches: the end of a copied object would make the parent
  deaf.

So a child begins with the signals as they were before us, and with /dev/null in place of those
descriptors. Not closed: whatever holds their numbers may close them once more, when another file
has them. Nothing is said on the connections; they are still the parent's.

A fork in C, past Python, is no concern of this: such a child runs nothing of ours, and a signal
counts only in the process that it was sent to, see `stopping`.
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
"""Tells whether a descriptor is still the file that it was."""

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
    From now on, what this process forks is free of it. Once per process, before it handles any
    signal.
    """
    originals = {number: signal.getsignal(number) for number in SIGNALS}

    def hold_signals() -> None:
        # Python forgets signals that arrive while it forks, and until it is free a child would
        # pass them to its parent.
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def release_signals() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)

    def free_child() -> None:
        _copies.add(os.getpid())
        signal.set_wakeup_fd(-1)
        for number, original in originals.items():
            signal.signal(number, signal.SIG_DFL if original is None else original)
        if signal.getsignal(signal.SIGCHLD) is None:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the event loop's, which tells ours
        _replace_withheld()
        release_signals()

    os.register_at_fork(
        before=hold_signals, after_in_parent=release_signals, after_in_child=free_child
    )


def end_copy() -> None:
    """
    End this process if it is a forked child whose handler has returned: what follows is the
    parent's.
    """
    if _copies:
        os._exit(0)


def open_descriptors() -> set[int]:
    """
    The descriptors that are open now; none where the system cannot list them.
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
