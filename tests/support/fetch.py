"""
Installs the servers that the collected tests need and this machine lacks.

This needs root on Debian or a derivative, and changes the machine no more than `apt-get install`
does. On other machines it does nothing, and the tests say what would help. If several processes run
the tests, one of them installs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.support import debian, pgbouncer, postgres, proxies, rabbitmq

Say = Callable[[str], None]


def fetch(
    majors: Sequence[str],
    versions: Sequence[str],
    *,
    with_pgbouncer: bool = False,
    with_proxies: bool = False,
    say: Say,
) -> None:
    """
    Install these versions of PostgreSQL and RabbitMQ, as far as possible on this machine.

    Args:
        with_pgbouncer: Install PgBouncer, too.
        with_proxies: Install nginx and HAProxy, too.
        say: Called with a line about each step that is slow or fails.
    """
    if os.geteuid() != 0:
        return
    cache = debian.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages = [pgbouncer.PACKAGE] if with_pgbouncer and pgbouncer.missing() else []
        packages += proxies.missing_packages() if with_proxies else []
        _fetch_what_is_missing(majors, versions, packages, say)


def _fetch_what_is_missing(
    majors: Sequence[str], versions: Sequence[str], packages: Sequence[str], say: Say
) -> None:
    absent = [version for version in versions if debian.ready_tree(version) is None]
    if not debian.may_use_trees() or rabbitmq.is_chosen_by_hand():
        absent = []
    if absent and shutil.which("debootstrap") is None and _has_apt():
        _apt_install("debootstrap", say)
    with ThreadPoolExecutor() as pool:
        # Trees take longest, so they are built while packages are installed.
        trees = _begin_to_make_trees(absent, pool, say)
        if postgres.missing(majors) and _has_apt():
            _fetch_postgres(say)
        for package in packages if _has_apt() else ():
            _apt_install(package, say)
        for tree in trees:
            try:
                tree.result()
            except debian.CannotMakeTree as error:
                say(str(error))


def _fetch_postgres(say: Say) -> None:
    # Debian would start a system-wide server; the tests need only the programs.
    configuration = Path("/etc/postgresql-common/createcluster.conf")
    if not configuration.exists():
        configuration.parent.mkdir(exist_ok=True)
        configuration.write_text("create_main_cluster = false\n")
    _apt_install(f"postgresql-{postgres.OLDEST}", say)


def _begin_to_make_trees(
    versions: Sequence[str], pool: ThreadPoolExecutor, say: Say
) -> list[Future[Path]]:
    if not versions or shutil.which("debootstrap") is None:
        return []
    say(f"fetching RabbitMQ {' and '.join(versions)}, once, about a minute")
    return [pool.submit(debian.make_tree, version) for version in versions]


def _has_apt() -> bool:
    return shutil.which("apt-get") is not None


def _apt_install(package: str, say: Say) -> None:
    say(f"installing {package}")
    install = ["apt-get", "install", "--yes", "--no-install-recommends", package]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (install, ["apt-get", "update"], install):
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if command is install and done.returncode == 0:
            return
    say(f"`{' '.join(install)}` failed: {done.stderr.strip().splitlines()[-1:]}")
