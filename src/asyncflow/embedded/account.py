"""
The operating system user an embedded PostgreSQL runs as.

PostgreSQL refuses to run as root. When AsyncFlow itself is root (a container, a bare
server), the server gets an account without a password and without rights of its own.
That account must still reach programs and data under folders it may not enter, such
as /root, whose permissions are not ours to change. There it keeps one capability: to
pass through folders.

Starting and stopping the server is `cluster`'s.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from asyncflow.errors import NoServerAccount

PREFERRED_NAME = "postgres"
OWN_NAME = "asyncflow"

# The first is enough; containers often withhold it and grant the second, wider one.
CAPABILITIES = ("dac_read_search", "dac_override")


@dataclass(frozen=True, slots=True)
class Launcher:
    """
    How to start a program as the server's account.

    `uid` and `gid` are None when the program simply runs as the present user, or when
    `prefix` is a command that changes the user by itself.
    """

    prefix: tuple[str, ...] = ()
    uid: int | None = None
    gid: int | None = None
    owner: tuple[int, int] | None = None

    def popen(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        output: int | IO[bytes] = subprocess.DEVNULL,
    ) -> subprocess.Popen[bytes]:
        """
        Start a program in a session of its own, so that a Ctrl-C in the terminal passes it by.

        `output` receives standard output and standard error together.
        """
        return subprocess.Popen(
            [*self.prefix, *argv],
            bufsize=0,
            cwd="/",
            env=environment,
            stdin=stdin,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
        )

    def take(self, path: Path) -> None:
        """
        Make `path` the server account's own; nothing to do unless we are root.
        """
        if self.owner is not None:
            os.chown(path, *self.owner)


def launcher_for(folder: Path, program: Path) -> Launcher:
    """
    Find a way to run `program` with `folder` writable for it.

    Raises:
        NoServerAccount: We are root and there is no such way.
    """
    if os.geteuid() != 0:
        return Launcher()

    account = _account(folder)
    owner = (account.pw_uid, account.pw_gid)
    with contextlib.suppress(PermissionError):  # Then the probes below fail as well.
        os.chown(folder, *owner)
    candidates = [Launcher(uid=account.pw_uid, gid=account.pw_gid, owner=owner)]
    if setpriv := shutil.which("setpriv"):
        candidates += [
            Launcher(prefix=_keeping(capability, setpriv, *owner), owner=owner)
            for capability in CAPABILITIES
        ]
    for launcher in candidates:
        if _reaches(launcher, program, folder):
            return launcher
    raise NoServerAccount(folder, f"user {account.pw_name!r} cannot reach it or {program.parent}")


def _account(folder: Path) -> pwd.struct_passwd:
    # A cluster that an ordinary user made stays that user's, also under sudo.
    owner = folder.stat().st_uid
    if owner != 0:
        try:
            return pwd.getpwuid(owner)
        except KeyError as error:
            raise NoServerAccount(folder, f"its owner, uid {owner}, has no name") from error
    for name in (PREFERRED_NAME, OWN_NAME):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return _create_account(folder)


def _create_account(folder: Path, name: str = OWN_NAME) -> pwd.struct_passwd:
    useradd = shutil.which("useradd")
    if useradd is None:
        raise NoServerAccount(folder, f"there is no user {PREFERRED_NAME!r} and no `useradd`")
    created = subprocess.run(
        [useradd, "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        + ["--shell", "/usr/sbin/nologin", name],
        capture_output=True,
        text=True,
    )
    try:
        # Whatever it says: another process may have been first.
        return pwd.getpwnam(name)
    except KeyError:
        says = created.stderr.strip()
        raise NoServerAccount(folder, f"`useradd {name}` says: {says}") from None


def _keeping(capability: str, setpriv: str, uid: int, gid: int) -> tuple[str, ...]:
    # PostgreSQL looks for its own files with access(2), which ignores the capabilities
    # of a user other than root unless no_setuid_fixup is set.
    return (
        setpriv,
        f"--reuid={uid}",
        f"--regid={gid}",
        "--clear-groups",
        f"--inh-caps=-all,+{capability}",
        f"--ambient-caps=-all,+{capability}",
        "--securebits=+no_setuid_fixup",
        "--",
    )


def _reaches(launcher: Launcher, program: Path, folder: Path) -> bool:
    probe = ["sh", "-c", 'test -x "$0" && test -w "$1"', str(program), str(folder)]
    try:
        return launcher.popen(probe, environment=os.environ).wait() == 0
    except PermissionError:  # Some containers forbid even root to change the user.
        return False
