"""
What a test can do with a RabbitMQ broker, wherever that runs.

Each test gets its own virtual host, created through the management plugin in a few milliseconds
(`rabbitmqctl` takes more than a second).

`rabbitmq` decides where a broker comes from.
"""

from __future__ import annotations

import itertools
import json
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from base64 import b64encode
from typing import Any
from urllib.parse import urlsplit


class Broker(ABC):
    """
    A RabbitMQ with the management plugin and a user who has all permissions.

    Args:
        url: An AMQP URL with user and password; its virtual host does not matter.
        management_url: The base URL of the management plugin.
    """

    def __init__(self, url: str, management_url: str) -> None:
        self._parts = urlsplit(url)
        self._management_url = management_url.rstrip("/")
        self._numbers = itertools.count(1)

    @property
    def url(self) -> str:
        """
        The AMQP URL of the default virtual host.
        """
        return self._url("%2F")

    @property
    def management_url(self) -> str:
        """
        The base URL of its management plugin.
        """
        return self._management_url

    @property
    def version(self) -> str:
        """
        The full version of the running broker, such as 4.0.5.
        """
        return str(self.api("GET", "overview")["rabbitmq_version"])

    def answers(self) -> bool:
        """
        Whether the broker is up, according to its management plugin.
        """
        try:
            self.api("GET", "overview")
        except OSError:
            return False
        return True

    def create_vhost(self) -> str:
        """
        Create an empty virtual host and return its AMQP URL.
        """
        name = f"test-{next(self._numbers)}"
        # The user who creates a virtual host gets all permissions in it.
        self.api("DELETE", f"vhosts/{name}", ignore_missing=True)
        self.api("PUT", f"vhosts/{name}", {})
        return self._url(name)

    def drop_vhost(self, url: str) -> None:
        """
        Remove a virtual host with its queues; its connections are closed.
        """
        self.api("DELETE", f"vhosts/{urlsplit(url).path[1:]}", ignore_missing=True)

    def api(self, method: str, path: str, body: Any = None, *, ignore_missing: bool = False) -> Any:
        """
        Call the management API, for instance `api("GET", "queues/test-1")`.

        Returns:
            The JSON response, or None if it is empty.
        """
        request = urllib.request.Request(
            f"{self._management_url}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": self._authorization, "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                if not (ignore_missing and error.code == 404):
                    raise
            return None
        return json.loads(content) if content else None

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """
        The process id of the broker; None while it is not running.
        """

    @abstractmethod
    def start(self) -> None:
        """
        Start the broker with its former data and port, and return when it answers.
        """

    @abstractmethod
    def stop(self) -> None:
        """
        Stop the broker gracefully and wait until its process has ended.
        """

    @abstractmethod
    def kill(self) -> None:
        """
        Kill the broker as a crash would.
        """

    @abstractmethod
    def pause(self) -> None:
        """
        Freeze the broker: connections stay open, but nothing answers.
        """

    @abstractmethod
    def resume(self) -> None:
        """
        Let a frozen broker continue; do nothing if it is not frozen.
        """

    @abstractmethod
    def wipe(self) -> None:
        """
        Restart without any data, on the same port; virtual hosts are gone too.
        """

    @abstractmethod
    def close(self) -> None:
        """
        Stop the broker permanently and remove its data.
        """

    @abstractmethod
    def ctl(self, *arguments: str) -> str:
        """
        Run `rabbitmqctl` and return its output.
        """

    def _url(self, vhost: str) -> str:
        return f"amqp://{self._parts.netloc}/{vhost}"

    @property
    def _authorization(self) -> str:
        user, password = self._parts.username or "guest", self._parts.password or "guest"
        return "Basic " + b64encode(f"{user}:{password}".encode()).decode()
