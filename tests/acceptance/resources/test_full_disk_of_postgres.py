"""
PostgreSQL's disk fills up while tasks flow: nothing accepted is lost, and once there is space again
everything completes without a restart of AsyncFlow's processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.acceptance.resources.conftest import a_system
from tests.support import postgres, scratch
from tests.support.disk import SmallDisk, small_disk
from tests.support.postgres import PostgresServer

FLOWING_AGAIN_SECONDS = 30.0
DISK_MEBIBYTES = 128

WORKING = {"seconds": 0.1}
# As large as a row gets without compression, so that tasks soon need another page.
BULKY = {"seconds": 0.2, "filler": "x" * 1_500}


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    """
    A disk that can be filled.
    """
    with small_disk("disk", mebibytes=DISK_MEBIBYTES) as disk:
        yield disk
        disk.free()


@pytest.fixture
def other_folder() -> Iterator[Path]:
    """
    A folder on another disk.
    """
    folder = scratch.make_folder("elsewhere", in_memory=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def move_wal(server: PostgresServer, folder: Path) -> None:
    """
    Move the server's write-ahead log to another folder, as on a separate disk.
    """
    server.cluster.stop()
    wal = server.cluster.folder / "data" / "pg_wal"
    owner = wal.stat()
    os.chown(folder, owner.st_uid, owner.st_gid)
    subprocess.run(["cp", "--archive", f"{wal}/.", str(folder)], check=True)
    shutil.rmtree(wal)
    wal.symlink_to(folder)
    server.cluster.start()


async def test_a_full_disk_of_tables_costs_time_and_no_task(
    disk: SmallDisk,
    other_folder: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """
    PostgreSQL refuses only what needs another page: submissions get 503 and are not stored, and the
    outcomes of attempts that ran meanwhile are written once there is space.
    """
    with postgres.running_server(postgres.EMBEDDED, folder=disk.folder) as server:
        url = await asyncio.to_thread(server.create_database)
        await asyncio.to_thread(move_wal, server, other_folder)
        async with a_system(request, tmp_path, url) as system:
            _, [worker], _ = await system.start()

            async with system.load("sample-task", payload=BULKY) as load:
                await load.has_accepted(20)
                await asyncio.to_thread(disk.fill)
                await load.is_refused()
                await worker.complains("No space left on device")
                await worker.log_event("settle.delayed")
                disk.free()
                await load.has_accepted(5)
                await system.finishes(load.accepted[-1], timeout_seconds=FLOWING_AGAIN_SECONDS)

            await system.has_lost_nothing(load)
            assert [] == await system.punished()
            [stored] = await system.rows("SELECT count(*) FROM asyncflow.tasks")
            assert len(load.accepted) == stored["count"]


async def test_a_full_disk_of_the_write_ahead_log_costs_time_and_no_task(
    disk: SmallDisk, other_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """
    PostgreSQL panics and cannot recover until there is space: the API answers 503 meanwhile, and
    afterwards everything completes.
    """
    with postgres.running_server(postgres.EMBEDDED, folder=other_folder) as server:
        url = await asyncio.to_thread(server.create_database)
        await asyncio.to_thread(move_wal, server, disk.folder)
        async with a_system(request, tmp_path, url) as system:
            await system.start()

            async with system.load(payload=WORKING) as load:
                await load.has_accepted(20)
                await asyncio.to_thread(disk.fill)
                await use_up_write_ahead_log(url)
                await load.is_refused()
                disk.free()
                await system.until(lambda: has_come_back(server), "PostgreSQL is back")
                await load.has_accepted(5)
                await system.finishes(load.accepted[-1], timeout_seconds=FLOWING_AGAIN_SECONDS)

            assert "PANIC" in server.cluster.log_file.read_text()
            await system.has_lost_nothing(load)
            assert [] == await system.punished()


async def use_up_write_ahead_log(url: str) -> None:
    """
    Start one WAL file after another until there is no space for the next.
    """
    connection = await asyncpg.connect(url)
    with contextlib.suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
        while True:
            await connection.execute("SELECT pg_logical_emit_message(true, 'a', 'b')")
            await connection.execute("SELECT pg_switch_wal()")
    connection.terminate()


async def has_come_back(server: PostgresServer) -> bool:
    """
    Whether PostgreSQL accepts connections; if it has exited, restart it as a supervisor would.
    """
    if server.cluster.pid is None:
        await asyncio.to_thread(server.cluster.stop)
        await asyncio.to_thread(server.cluster.start)
    try:
        connection = await asyncpg.connect(server.cluster.url)
    except (asyncpg.PostgresError, OSError):
        return False
    await connection.close()
    return True
