"""
RabbitMQ in minimal Debian trees, for machines whose own packages are too old.

debootstrap creates the trees in about half a minute each; they are kept in AsyncFlow's cache
folder, outside the repository. `node` runs RabbitMQ from them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

SUITES = {"4.0": "trixie", "4.3": "sid"}


class CannotMakeTree(Exception):
    """
    debootstrap failed; the message says where its log is.
    """

    def __init__(self, suite: str, log_file: Path) -> None:
        super().__init__(f"debootstrap of Debian {suite} failed, see {log_file}")


def ready_tree(version: str) -> Path | None:
    """
    The tree with this version of RabbitMQ; None if it does not exist or is not usable here.
    """
    tree = _tree(SUITES[version])
    return tree if tree.is_dir() and may_use_trees() else None


def may_use_trees() -> bool:
    """
    Whether this process may mount and chroot.
    """
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def make_tree(version: str) -> Path:
    """
    Create the tree with this version of RabbitMQ unless it exists; needs root.

    Idempotent; safe to run concurrently in several processes, and to interrupt.

    Raises:
        CannotMakeTree: debootstrap failed.
    """
    suite = SUITES[version]
    tree = _tree(suite)
    tree.parent.mkdir(parents=True, exist_ok=True)
    with (tree.parent / f"{tree.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            _debootstrap(suite, tree)
    return tree


def _debootstrap(suite: str, tree: Path) -> None:
    # It has another name until it is complete, so an interrupted run leaves no partial tree.
    unfinished = tree.with_name(f"{tree.name}.unfinished")
    log_file = tree.with_name(f"{tree.name}.log")
    shutil.rmtree(unfinished, ignore_errors=True)
    with log_file.open("w") as log:
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=adduser,rabbitmq-server"]
            + [suite, str(unfinished)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if made.returncode != 0 or not (unfinished / "usr/lib/rabbitmq/bin/rabbitmq-server").exists():
        raise CannotMakeTree(suite, log_file)
    (unfinished / "etc/hosts").touch()
    unfinished.rename(tree)


def _tree(suite: str) -> Path:
    return cache_folder() / f"rabbitmq-{suite}"


def cache_folder() -> Path:
    """
    The folder that keeps downloads between test runs.
    """
    if chosen := os.environ.get("ASYNCFLOW_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "asyncflow"
