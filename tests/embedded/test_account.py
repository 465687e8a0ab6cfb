"""
The account that the embedded PostgreSQL runs as when AsyncFlow is root.
"""

import os
import pwd
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from asyncflow.embedded import Cluster, account
from tests.support import scratch

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or sys.platform != "linux", reason="only root has a choice"
)


@pytest.fixture
def folder() -> Iterator[Path]:
    path = scratch.make_folder("account", in_memory=True)
    yield path
    shutil.rmtree(path)


def account_of(cluster: Cluster) -> str:
    return psutil.Process(cluster.pid).username()


def test_root_runs_the_server_under_another_account(folder):
    """The server runs as an ordinary user, who owns all of its data."""
    with Cluster(folder / "pg") as cluster:
        owner = pwd.getpwuid((folder / "pg" / "data").stat().st_uid).pw_name

        assert account_of(cluster) == owner
        assert owner != "root"


def test_a_folder_that_only_root_may_enter_is_no_obstacle(folder):
    """A data folder below one like /root works, and the outer folder keeps its permissions."""
    private = folder / "private"
    private.mkdir(mode=0o700)

    with Cluster(private / "pg") as cluster:
        assert account_of(cluster) != "root"
    assert 0o700 == private.stat().st_mode & 0o777
    assert 0 == private.stat().st_uid


def test_a_users_cluster_stays_that_users_under_sudo(folder):
    """Root runs the server as the owner of its folder, who can still use it afterwards."""
    nobody = pwd.getpwnam("nobody")
    theirs = folder / "pg"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, nobody.pw_uid, nobody.pw_gid)
    folder.chmod(0o711)

    with Cluster(theirs) as cluster:
        assert "nobody" == account_of(cluster)
    assert {path.stat().st_uid for path in theirs.rglob("*")} == {nobody.pw_uid}


def test_an_account_that_another_process_has_just_made_is_used(folder):
    """Of two processes that find no account, one makes it; `useradd` refuses the other."""
    assert "nobody" == account._create_account(folder, "nobody").pw_name
