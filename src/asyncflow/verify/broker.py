"""
The RabbitMQ of a run: a node that the run starts, if the machine has the programs, or a given one.

Both are controlled through the management plugin. Only the run's own can be stopped and killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import socket
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import psutil

from asyncflow.errors import NoBroker
from asyncflow.transport.amqp import Channel, connect
from asyncflow.transport.amqp.url import parse_url

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 30.0
CTL_SECONDS_MAX = 90.0
POLL_SECONDS = 0.1
MAJOR_VERSION_MIN = 4
SAID_BYTES_MAX = 1_000
ERLANG_ARGUMENTS = "+S 1:1 +sbwt none"
"""One scheduler thread, to leave the cores to AsyncFlow."""

CONFIGURATION = """
listeners.tcp.1 = 127.0.0.1:{port}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management_port}
raft.wal_max_size_bytes = 67108864
disk_free_limit.absolute = 50MB
log.console = true
log.console.level = warning
"""

# Debian's script runs the program as another user, which cannot enter our folder.
DEBIANS_SCRIPT, PROGRAMS = "/usr/sbin/rabbitmq-server", "/usr/lib/rabbitmq/bin"

# Otherwise the distribution's epmd daemon would be started, and stay.
GUARD = """
    epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 &
    "$@" &
    read -r _
    kill -KILL 0
"""


class Broker:
    """
    A RabbitMQ with the management plugin, and a virtual host of its own for this run.

    Args:
        url: Its AMQP URL, of a user who is an administrator; the virtual host does not matter.
        management_url: Where its management plugin answers; None is port 15672 of the same host.

    Attributes:
        version: Such as 4.0.5; empty until it is open.

    Raises:
        InvalidSettings: The URL is ambiguous.
        NoBroker: A run cannot use it.
    """

    is_ours = False

    def __init__(self, url: str, management_url: str | None = None) -> None:
        parse_url(url)  # Refuses one whose password would partly be taken for a host.
        self._parts = urlsplit(url)
        if self._parts.scheme != "amqp":
            raise NoBroker(
                "The broker's URL must begin with amqp://: faults cannot be injected into TLS."
            )
        self._user = unquote(self._parts.username or "guest")
        self._password = unquote(self._parts.password or "guest")
        self._management_url = (management_url or f"http://{self.address[0]}:15672").rstrip("/")
        # A private one, because other runs may use the same broker.
        self._vhost = f"asyncflow-verify-{secrets.token_hex(4)}"
        self.version = ""

    @property
    def address(self) -> tuple[str, int]:
        """
        Host and port of its AMQP listener.
        """
        return self._parts.hostname or "127.0.0.1", self._parts.port or 5672

    def url(self, *, port: int) -> str:
        """
        The AMQP URL of the run's virtual host through a port of this machine.
        """
        return self._url("127.0.0.1", port)

    async def open(self) -> None:
        """
        Wait until it answers, and create the run's virtual host.

        Raises:
            NoBroker: It does not answer, is too old, or refuses this user.
        """
        try:
            await self.start()
            self.version = str((await self.api("GET", "overview"))["rabbitmq_version"])
            if int(self.version.partition(".")[0]) < MAJOR_VERSION_MIN:
                raise NoBroker(f"RabbitMQ {self.version} is too old.")
            await self.make_vhost()
        except urllib.error.HTTPError as error:
            raise NoBroker(
                f"{self._management_url} answers {error.code} to the user {self._user!r}, who must "
                "be an administrator of RabbitMQ."
            ) from error
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "reason", error)
            raise NoBroker(
                f"No management plugin of RabbitMQ answers at {self._management_url}: {reason}."
            ) from error

    async def start(self) -> None:
        """
        Do nothing: a given broker is not ours to start.
        """

    async def close(self) -> None:
        """
        Delete everything of this run.
        """
        with contextlib.suppress(OSError):
            await self.api("DELETE", f"vhosts/{self._vhost}")

    async def make_vhost(self) -> None:
        """
        Recreate the virtual host: its contents are erased and its connections closed.
        """
        try:
            await self.api("DELETE", f"vhosts/{self._vhost}")
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                raise
        await self.api("PUT", f"vhosts/{self._vhost}", {})

    async def answers(self) -> bool:
        """
        Whether it is up, according to its management plugin.
        """
        try:
            await self.api("GET", "overview")
        except OSError:
            return False
        return True

    async def queues(self) -> list[dict[str, Any]]:
        """
        The run's queues with their counts, which may be a few seconds old.

        Raises:
            OSError: It does not answer.
        """
        counted = "disable_stats=true&enable_queue_totals=true"
        return list(await self.api("GET", f"queues/{self._vhost}?{counted}") or [])

    async def redelivered(self) -> int:
        """
        How often its queues brought a message again, until some seconds ago; what happened in a
        queue before it was deleted is forgotten.

        Raises:
            OSError: It does not answer.
        """
        queues = await self.api("GET", f"queues/{self._vhost}") or []
        return sum(q.get("message_stats", {}).get("redeliver", 0) for q in queues)

    async def ready(self) -> int:
        """
        How many messages are waiting in its queues now.
        """
        async with self._channel() as channel:
            counts = [await channel.inspect_queue(q["name"]) for q in await self.queues()]
        return sum(count.messages for count in counts if count is not None)

    async def purge(self) -> int:
        """
        Empty all queues; return how many messages were waiting in them.
        """
        async with self._channel() as channel:
            return sum([await channel.purge_queue(q["name"]) for q in await self.queues()])

    async def delete_queues(self) -> int:
        """
        Delete all queues; return how many messages were waiting in them.
        """
        async with self._channel() as channel:
            return sum([await channel.delete_queue(q["name"]) for q in await self.queues()])

    async def close_connections(self) -> int:
        """
        Close every connection of the run; return how many.
        """
        connections = await self.api("GET", f"vhosts/{self._vhost}/connections") or []
        for connection in connections:
            with contextlib.suppress(urllib.error.HTTPError):
                await self.api("DELETE", f"connections/{quote(connection['name'], safe='')}")
        return len(connections)

    @asynccontextmanager
    async def _channel(self) -> AsyncIterator[Channel]:
        connection = await connect(self._url(*self.address), name="asyncflow verify")
        try:
            yield await connection.channel()
        finally:
            await connection.close()

    async def api(self, method: str, path: str, body: Any = None) -> Any:
        """
        Call the management plugin with JSON; return JSON, or None if the response is empty.
        """
        return await asyncio.to_thread(self._call, method, path, body)

    def _call(self, method: str, path: str, body: Any) -> Any:
        token = b64encode(f"{self._user}:{self._password}".encode()).decode()
        request = urllib.request.Request(
            f"{self._management_url}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def _url(self, host: str, port: int) -> str:
        login = f"{quote(self._user, safe='')}:{quote(self._password, safe='')}"
        return f"amqp://{login}@{host}:{port}/{self._vhost}"


class OwnBroker(Broker):
    """
    A node that is a child of ours, with its data in `folder`.

    Raises:
        NoBroker: There is no rabbitmq-server on the PATH.
    """

    is_ours = True

    def __init__(self, folder: Path) -> None:
        found, self._path = shutil.which("rabbitmq-server"), os.environ["PATH"]
        if found is None:
            raise NoBroker("There is no rabbitmq-server on the PATH.")
        if found == DEBIANS_SCRIPT:
            self._path = f"{PROGRAMS}:{self._path}"
        self._folder = folder
        self._port, self._management_port, self._dist_port, self._epmd_port = free_ports(4)
        self._process: asyncio.subprocess.Process | None = None
        super().__init__(
            f"amqp://guest:guest@127.0.0.1:{self._port}",
            f"http://127.0.0.1:{self._management_port}",
        )

    async def start(self) -> None:
        """
        Start it and wait until it is up, if it is not; data and ports stay the same.

        Raises:
            NoBroker: It ended or was not up in time.
        """
        if self._process is not None and await self.answers():
            return
        await self.kill()
        self._folder.mkdir(parents=True, exist_ok=True)
        configuration = CONFIGURATION.format(port=self._port, management_port=self._management_port)
        (self._folder / "rabbitmq.conf").write_text(configuration)
        (self._folder / "enabled_plugins").write_text("[rabbitmq_management].")
        with (self._folder / "console.log").open("ab") as log:
            said_before = log.tell()
            self._process = await asyncio.create_subprocess_exec(
                *("sh", "-c", GUARD, "sh", "rabbitmq-server"),
                env=self._environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(START_SECONDS_MAX):
                while True:
                    if await self._is_up(said_before):
                        return
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            await self.kill()
            said = self._said(said_before)[-SAID_BYTES_MAX:].decode(errors="replace").strip()
            raise NoBroker(
                f"rabbitmq-server was not up after {START_SECONDS_MAX:.0f} s; its output: {said!r}."
            ) from None

    async def _is_up(self, said_before: int) -> bool:
        # Its ports open shortly before it can be stopped gracefully.
        return b"completed with" in self._said(said_before) and await self.answers()

    def _said(self, said_before: int) -> bytes:
        return (self._folder / "console.log").read_bytes()[said_before:]

    async def stop(self) -> None:
        """
        Stop it gracefully, or else by force; it has ended afterwards.
        """
        try:
            async with asyncio.timeout(STOP_SECONDS_MAX):
                await self._end_in_good_order()
        finally:
            await self.kill()

    async def _end_in_good_order(self) -> None:
        # By a signal: on a busy machine rabbitmqctl takes a minute to start.
        for node in self._nodes():
            node.terminate()
        while True:
            if not self._nodes():
                return
            await asyncio.sleep(POLL_SECONDS)

    def _nodes(self) -> list[psutil.Process]:
        if self._process is None or self._process.returncode is not None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            return [process for process in family if _is_node(process)]
        return []

    async def kill(self) -> None:
        """
        Kill it, as in a crash.
        """
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def wipe(self) -> None:
        """
        Kill it, and start it without any data except an empty virtual host.
        """
        await self.kill()
        await asyncio.to_thread(shutil.rmtree, self._folder / "mnesia")
        await self.start()
        await self.make_vhost()

    async def alarm(self, *, on: bool) -> None:
        """
        Raise or clear a memory alarm, which blocks every publisher.
        """
        await self._ctl("set_vm_memory_high_watermark", "0" if on else "0.6")

    async def has_alarm(self) -> bool:
        """
        Whether it reports an alarm.
        """
        try:
            await self.api("GET", "health/checks/local-alarms")
        except urllib.error.HTTPError as error:
            return error.code == HTTPStatus.SERVICE_UNAVAILABLE
        return False

    async def close(self) -> None:
        """
        Kill it permanently.
        """
        await self.kill()

    async def _ctl(self, *arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *("rabbitmqctl", *arguments),
            env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(CTL_SECONDS_MAX):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": self._path,
            "LANG": "C.UTF-8",
            "HOME": str(self._folder),  # The folder of Erlang's cookie.
            "RABBITMQ_NODENAME": "asyncflow-verify@localhost",
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "none.conf"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": ERLANG_ARGUMENTS,
            "RABBITMQ_CTL_ERL_ARGS": ERLANG_ARGUMENTS,
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }


def _is_node(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name() == "beam.smp" and process.status() != psutil.STATUS_ZOMBIE
    return False


def free_ports(count: int) -> list[int]:
    """
    Free ports of 127.0.0.1, outside the ephemeral range.

    Inside that range, a client could take the port of a server that is restarting.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.add(port)
    return [*ports]
