"""
A RabbitMQ node that the tests run, with its data in a temporary folder.

Its processes are in one group, and in a PID namespace where available. A shell that waits on our
pipe kills them all when the test run ends, however that happens.

`rabbitmq` decides whether the tests use such a node.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from tests.support import scratch
from tests.support.broker import Broker
from tests.support.ports import free_ports

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
POLL_SECONDS = 0.02

# Otherwise Erlang would start epmd, its port mapper, which would outlive the node.
GUARD = """
    epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 &
    "$@" &
    read -r _
    kill -KILL 0
"""

CONFIGURATION = """
listeners.tcp.1 = 127.0.0.1:{port}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management_port}
raft.wal_max_size_bytes = 67108864
disk_free_limit.absolute = 50MB
log.console = true
log.console.level = warning
"""


class ProcessBroker(Broker):
    """
    A node that is a child process of ours.

    Args:
        erlang_arguments: Arguments of the Erlang VM. The default is one scheduler, which leaves the
            cores to the tests.
        folder: An empty folder for its data, removed at the end; None creates one.
    """

    def __init__(
        self,
        installation: Installation,
        *,
        erlang_arguments: str = "+S 1:1 +sbwt none",
        folder: Path | None = None,
    ) -> None:
        self._installation = installation
        self._erlang_arguments = erlang_arguments
        self._folder = folder or scratch.make_folder("rabbitmq", in_memory=False)
        self._port, self._management_port, self._dist_port, self._epmd_port = free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None
        super().__init__(
            f"amqp://guest:guest@127.0.0.1:{self._port}",
            f"http://127.0.0.1:{self._management_port}",
        )

    @property
    def log_file(self) -> Path:
        """
        The node's output, across all its starts.
        """
        return self._folder / "console.log"

    @property
    def pid(self) -> int | None:
        beam = self._beam()
        return beam.pid if beam else None

    def start(self) -> None:
        if self.pid is not None:
            return
        self._end_process()
        self._write_configuration()
        with self.log_file.open("ab") as log:
            said_before = log.tell()
            self._process = subprocess.Popen(
                self._installation.command(
                    self._folder, "sh", "-c", GUARD, "sh", "rabbitmq-server", contained=True
                ),
                env=self._environment(),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._wait_until_ready(said_before)

    def stop(self) -> None:
        self.resume()
        self._end_beam(signal.SIGTERM)

    def kill(self) -> None:
        self._end_beam(signal.SIGKILL)

    def pause(self) -> None:
        if beam := self._beam():
            beam.suspend()

    def resume(self) -> None:
        if beam := self._beam():
            beam.resume()

    def wipe(self) -> None:
        self.kill()
        shutil.rmtree(self._folder / "mnesia", ignore_errors=True)
        self.start()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def ctl(self, *arguments: str) -> str:
        done = subprocess.run(
            self._installation.command(self._folder, "rabbitmqctl", *arguments),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        if done.returncode != 0:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}")
        return done.stdout

    def _beam(self) -> psutil.Process | None:
        if self._process is None or self._process.poll() is not None:
            return None
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            family = psutil.Process(self._process.pid).children(recursive=True)
            return next(filter(_is_beam, family), None)
        return None

    def _end_beam(self, how: signal.Signals) -> None:
        if beam := self._beam():
            beam.send_signal(how)
            # Its parent in the namespace may never reap it; then a zombie remains.
            wait_until(lambda: self._beam() is None, STOP_SECONDS_MAX, "the broker did not stop")
        self._end_process()

    def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.communicate()

    def _wait_until_ready(self, said_before: int) -> None:
        def is_ready() -> bool:
            said = self.log_file.read_bytes()[said_before:]
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"RabbitMQ did not start:\n{said.decode()[-4000:]}")
            # Its ports open slightly before it can be stopped gracefully.
            return b"completed with" in said and self.answers()

        wait_until(is_ready, START_SECONDS_MAX, "the broker did not start")

    def _write_configuration(self) -> None:
        configuration = CONFIGURATION.format(port=self._port, management_port=self._management_port)
        (self._folder / "rabbitmq.conf").write_text(configuration)
        (self._folder / "enabled_plugins").write_text("[rabbitmq_management].")

    def _environment(self) -> dict[str, str]:
        folder = self._installation.data_folder(self._folder)
        return {
            "PATH": f"/usr/lib/rabbitmq/bin:{os.environ['PATH']}",
            "LANG": "C.UTF-8",
            "HOME": str(folder),  # Erlang keeps its cookie here.
            "RABBITMQ_NODENAME": "asyncflow@localhost",
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none.conf"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": self._erlang_arguments,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }


def _is_beam(process: psutil.Process) -> bool:
    # psutil leaks a FileNotFoundError if a process ends during the call.
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
        return process.name() == "beam.smp" and process.status() != psutil.STATUS_ZOMBIE
    return False


class Installation(Protocol):
    """
    An installation of RabbitMQ: how to run its programs, and the path at which they see the node's
    data.
    """

    def data_folder(self, folder: Path) -> Path: ...

    def command(self, folder: Path, *argv: str, contained: bool = False) -> list[str]: ...


class OnPath:
    """
    RabbitMQ as installed on this machine.
    """

    def data_folder(self, folder: Path) -> Path:
        return folder

    def command(self, folder: Path, *argv: str, contained: bool = False) -> list[str]:
        return list(argv)


@dataclass(frozen=True, slots=True)
class DebianTree:
    """
    RabbitMQ in a Debian tree, entered by chroot.

    Mounts are made in a namespace of the command and vanish with it. `contained` adds a PID
    namespace, whose processes end with its first one.
    """

    tree: Path

    def data_folder(self, folder: Path) -> Path:
        return Path("/var/lib/rabbitmq")

    def command(self, folder: Path, *argv: str, contained: bool = False) -> list[str]:
        enter = """
            mount --bind "$2" "$1/var/lib/rabbitmq"
            mount --bind /etc/hosts "$1/etc/hosts"
            mount --rbind /dev "$1/dev"
            mount -t proc proc "$1/proc" 2>/dev/null || mount --bind /proc "$1/proc"
            tree=$1; shift 2
            exec chroot "$tree" "$@"
        """
        namespaces = ["--pid", "--fork", "--kill-child"] if contained else []
        return ["unshare", "--mount", *namespaces, "sh", "-ec", enter, "sh"] + [
            str(self.tree),
            str(folder),
            *argv,
        ]


def wait_until(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    """
    Return once the condition holds.

    Raises:
        RuntimeError: It did not hold in time; the message begins with `failure`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{failure} within {seconds:.0f} seconds")
        time.sleep(POLL_SECONDS)
