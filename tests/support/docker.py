"""
A RabbitMQ for the tests in a container of the official image, for machines with Docker.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from tests.support.broker import Broker
from tests.support.node import START_SECONDS_MAX, STOP_SECONDS_MAX, wait_until
from tests.support.ports import free_ports


def is_usable() -> bool:
    """
    Whether containers can run on this machine.
    """
    docker = shutil.which("docker")
    return (
        docker is not None and subprocess.run([docker, "info"], capture_output=True).returncode == 0
    )


class DockerBroker(Broker):
    """
    A node in a container of the official image.
    """

    def __init__(self, version: str) -> None:
        port, management_port = free_ports(2)
        self._image = f"rabbitmq:{version}-management"
        self._name = f"asyncflow-test-{os.getpid()}-{port}"
        self._publish = [f"127.0.0.1:{port}:5672", f"127.0.0.1:{management_port}:15672"]
        super().__init__(
            f"amqp://guest:guest@127.0.0.1:{port}", f"http://127.0.0.1:{management_port}"
        )

    @property
    def pid(self) -> int | None:
        pid = self._docker("inspect", "--format", "{{.State.Pid}}", self._name, check=False)
        return int(pid) if pid.strip().isdigit() and int(pid) else None

    def start(self) -> None:
        if not self._docker("ps", "--all", "--quiet", "--filter", f"name={self._name}").strip():
            ports = [part for mapping in self._publish for part in ("--publish", mapping)]
            self._docker("create", "--name", self._name, *ports, self._image)
        self._docker("start", self._name)
        wait_until(self.answers, START_SECONDS_MAX, "the broker did not start")
        self.ctl("await_startup")

    def stop(self) -> None:
        self.resume()
        self._docker("stop", "--time", f"{STOP_SECONDS_MAX:.0f}", self._name)

    def kill(self) -> None:
        self._docker("kill", self._name, check=False)

    def pause(self) -> None:
        self._docker("pause", self._name)

    def resume(self) -> None:
        self._docker("unpause", self._name, check=False)

    def wipe(self) -> None:
        self.close()
        self.start()

    def close(self) -> None:
        self._docker("rm", "--force", "--volumes", self._name, check=False)

    def ctl(self, *arguments: str) -> str:
        return self._docker("exec", self._name, "rabbitmqctl", *arguments)

    def _docker(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True)
        if check and done.returncode != 0:
            raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr}")
        return done.stdout
