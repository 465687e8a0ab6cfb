"""
Fetches the servers that the collected tests need and this machine lacks.

It needs root on Debian or a relative of it, and changes the machine no more than
`apt-get install` does. On other machines nothing happens here, and the tests themselves
say what would help.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from services import debian, postgres, rabbitmq

Say = Callable[[str], None]


def fetch_postgres(majors: Iterable[str], say: Say) -> None:
    """
    Install the oldest supported PostgreSQL where it is wanted and Debian has it.
    """
    if postgres.OLDEST in majors and postgres.oldest_bin_folder() is None and _has_apt():
        # Debian would run a server for everybody; the tests only want the programs.
        configuration = Path("/etc/postgresql-common/createcluster.conf")
        if not configuration.exists():
            configuration.parent.mkdir(exist_ok=True)
            configuration.write_text("create_main_cluster = false\n")
        _apt_install(f"postgresql-{postgres.OLDEST}", say)


def fetch_rabbitmq(versions: Iterable[str], say: Say) -> None:
    """
    Make the Debian folders of the wanted versions, side by side.
    """
    absent = [version for version in versions if debian.ready_tree(version) is None]
    if not absent or rabbitmq.is_chosen_by_hand() or not debian.may_use_trees():
        return
    if shutil.which("debootstrap") is None and _has_apt():
        _apt_install("debootstrap", say)
    if shutil.which("debootstrap") is None:
        return
    say(f"fetching RabbitMQ {' and '.join(absent)}, once, about a minute")
    with ThreadPoolExecutor() as pool:
        for made in [pool.submit(debian.make_tree, version) for version in absent]:
            try:
                made.result()
            except debian.CannotMakeTree as error:
                say(str(error))


def _has_apt() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


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
