"""
The RabbitMQ of a run: a node of our own, if the machine has the programs, or one that is given.

Both are steered through the management plugin. Only our own can be stopped and killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from asyncflow.errors import AsyncFlowError
from asyncflow.transport.amqp import connect

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
POLL_SECONDS = 0.1
VHOST = "asyncflow-verify"

CONFIGURATION = """
listeners.tcp.1 = 127.0.0.1:{port}
management.tcp.ip = 127.0.0.1
management.tcp.port = {management_port}
raft.wal_max_size_bytes = 67108864
disk_free_limit.absolute = 50MB
log.console = true
log.console.level = warning
"""

# The distribution's daemon would otherwise start itself and stay.
GUARD = """
    epmd -port "$ERL_EPMD_PORT" -address 127.0.0.1 &
    "$@" &
    read -r _
    kill -KILL 0
"""


class NoBroker(AsyncFlowError):
    """
    There is no RabbitMQ to run or to use.
    """

    def __init__(self, fact: str) -> None:
        super().__init__(
            f"{fact} Install rabbitmq-server 4, or give a broker with --broker-url and "
            "--management-url."
        )


class Broker:
    """
    A RabbitMQ with the management plugin, and a virtual host of its own for this run.

    Args:
        url: Its AMQP URL; the virtual host in it does not matter.
        management_url: Where its management plugin answers.
    """

    def __init__(self, url: str, management_url: str) -> None:
        self._parts = urlsplit(url)
        self._management_url = management_url.rstrip("/")

    is_ours = False

    @property
    def address(self) -> tuple[str, int]:
        """
        Where it takes AMQP connections.
        """
        return self._parts.hostname or "127.0.0.1", self._parts.port or 5672

    def url(self, *, port: int) -> str:
        """
        The AMQP URL of the run's virtual host through a port of this machine.
        """
        return self._url("127.0.0.1", port)

    async def start(self) -> None:
        """
        Return when it answers.

        Raises:
            NoBroker: It does not.
        """
        if not await self.answers():
            raise NoBroker("The management plugin of the given broker is silent.")

    async def close(self) -> None:
        """
        Leave nothing of this run behind.
        """
        with contextlib.suppress(OSError):
            await self.api("DELETE", f"vhosts/{VHOST}")

    async def make_vhost(self) -> None:
        """
        Begin with an empty virtual host.
        """
        with contextlib.suppress(urllib.error.HTTPError):
            await self.api("DELETE", f"vhosts/{VHOST}")
        await self.api("PUT", f"vhosts/{VHOST}", {})

    async def answers(self) -> bool:
        """
        Whether it is up, as its management plugin sees it.
        """
        try:
            await self.api("GET", "overview")
        except OSError:
            return False
        return True

    async def queues(self) -> list[dict[str, Any]]:
        """
        The run's queues with their counts; an empty list while it does not answer.
        """
        try:
            return list(
                await self.api("GET", f"queues/{VHOST}?disable_stats=true&enable_queue_totals=true")
                or []
            )
        except OSError:
            return []

    async def purge(self) -> int:
        """
        Empty all queues; return how many messages were waiting in them.
        """
        count = 0
        connection = await connect(self._url(*self.address), name="asyncflow verify")
        try:
            channel = await connection.channel()
            for queue in await self.queues():
                count += await channel.purge_queue(queue["name"])
        finally:
            await connection.close()
        return count

    async def delete_queues(self) -> int:
        """
        Delete all queues; return how many.
        """
        queues = await self.queues()
        for queue in queues:
            await self.api("DELETE", f"queues/{VHOST}/{quote(queue['name'], safe='')}")
        return len(queues)

    async def close_connections(self) -> int:
        """
        Let it close every connection of the run; return how many.
        """
        connections = await self.api("GET", f"vhosts/{VHOST}/connections") or []
        for connection in connections:
            with contextlib.suppress(urllib.error.HTTPError):
                await self.api("DELETE", f"connections/{quote(connection['name'], safe='')}")
        return len(connections)

    def _url(self, host: str, port: int) -> str:
        user = quote(self._parts.username or "guest", safe="")
        password = quote(self._parts.password or "guest", safe="")
        return f"amqp://{user}:{password}@{host}:{port}/{VHOST}"

    async def api(self, method: str, path: str, body: Any = None) -> Any:
        """
        Call the management plugin; JSON in and out, None for no answer.
        """
        return await asyncio.to_thread(self._call, method, path, body)

    def _call(self, method: str, path: str, body: Any) -> Any:
        user, password = self._parts.username or "guest", self._parts.password or "guest"
        token = b64encode(f"{user}:{password}".encode()).decode()
        request = urllib.request.Request(
            f"{self._management_url}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            content = answer.read()
        return json.loads(content) if content else None


class OwnBroker(Broker):
    """
    A node that is a child of ours, with its data in `folder`.

    Raises:
        NoBroker: There is no rabbitmq-server on the PATH.
    """

    is_ours = True

    def __init__(self, folder: Path) -> None:
        if shutil.which("rabbitmq-server") is None:
            raise NoBroker("There is no rabbitmq-server on the PATH.")
        self._folder = folder
        self._port, self._management_port, self._dist_port, self._epmd_port = free_ports(4)
        self._process: asyncio.subprocess.Process | None = None
        super().__init__(
            f"amqp://guest:guest@127.0.0.1:{self._port}",
            f"http://127.0.0.1:{self._management_port}",
        )

    async def start(self) -> None:
        """
        Return when it answers; data and port are those of before.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        configuration = CONFIGURATION.format(port=self._port, management_port=self._management_port)
        (self._folder / "rabbitmq.conf").write_text(configuration)
        (self._folder / "enabled_plugins").write_text("[rabbitmq_management].")
        with (self._folder / "console.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *("sh", "-c", GUARD, "sh", "rabbitmq-server"),
                env=self._environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        async with asyncio.timeout(START_SECONDS_MAX):
            while True:
                if await self.answers():
                    return
                await asyncio.sleep(POLL_SECONDS)

    async def stop(self) -> None:
        """
        Stop it in good order.
        """
        await self._ctl("stop")
        await self.kill()

    async def kill(self) -> None:
        """
        Kill it as a crash would.
        """
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    async def alarm(self, *, on: bool) -> None:
        """
        Raise a memory alarm, which blocks every publisher, or end it.
        """
        await self._ctl("set_vm_memory_high_watermark", "0" if on else "0.6")

    async def has_alarm(self) -> bool:
        """
        Whether it says that it takes no messages.
        """
        try:
            await self.api("GET", "health/checks/local-alarms")
        except urllib.error.HTTPError as error:
            return error.code == 503
        return False

    async def close(self) -> None:
        """
        End it for good.
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
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await process.wait()

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self._folder),  # Where Erlang keeps its cookie.
            "RABBITMQ_NODENAME": "asyncflow-verify@localhost",
            "RABBITMQ_CONF_ENV_FILE": str(self._folder / "none.conf"),
            "RABBITMQ_CONFIG_FILE": str(self._folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self._folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self._folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self._folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
        }


def free_ports(count: int) -> list[int]:
    """
    Ports of 127.0.0.1 that nobody listens on, outside the range that clients get theirs from.

    Inside it, a client could take the port of a server that is just restarting.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randint(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.add(port)
    return [*ports]
