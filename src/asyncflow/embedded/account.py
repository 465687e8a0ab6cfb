"""
The operating system user that an embedded PostgreSQL runs as.

PostgreSQL refuses to run as root. When AsyncFlow itself runs as root, in a container or on a bare
server, PostgreSQL gets an account without a password and without privileges. Its programs and
data may be in folders that this account cannot enter, such as /root, whose permissions we must
not change. In that case it keeps one capability, to pass through folders.

`cluster` starts and stops the server.
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

# The first is enough, but containers often withhold it and grant the second, wider one.
CAPABILITIES = ("dac_read_search", "dac_override")


@dataclass(frozen=True, slots=True)
class Launcher:
    """
    How to start a program as the server's account.

    `uid` and `gid` are None if the program runs as the current user, or if `prefix` is a command
    that changes the user.
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
        Start a program in a session of its own, so that Ctrl-C in the terminal does not reach it.

        `output` receives both standard output and standard error.
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
        Make the server's account the owner of `path`; does nothing unless we are root.
        """
        if self.owner is not None:
            os.chown(path, *self.owner)


def launcher_for(folder: Path, program: Path) -> Launcher:
    """
    Find an account that can run `program` and write to `folder`.

    Raises:
        NoServerAccount: We are root, and no other account can.
    """
    if os.geteuid() != 0:
        return Launcher()

    account = _account(folder)
    owner = (account.pw_uid, account.pw_gid)
    with contextlib.suppress(PermissionError):  # The probes below would then fail as well.
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
    # A cluster that an ordinary user created still belongs to that user under sudo.
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
        # Even if useradd failed: another process may have created the account first.
        return pwd.getpwnam(name)
    except KeyError:
        says = created.stderr.strip()
        raise NoServerAccount(folder, f"`useradd {name}` says: {says}") from None


def _keeping(capability: str, setpriv: str, uid: int, gid: int) -> tuple[str, ...]:
    # PostgreSQL checks for its own files with access(2), which ignores the capabilities
    # of users other than root unless no_setuid_fixup is set.
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
    except PermissionError:  # Some containers do not let even root change the user.
        return False
