"""
The process that serves HTTP, from settings to a clean exit.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from asyncflow.errors import AddressTaken
from asyncflow.processes.process import database, stop_signals, until_fit
from asyncflow.settings import Settings
from asyncflow.telemetry import events
from asyncflow.urls import address

if TYPE_CHECKING:
    # Each process imports only what it runs: a worker starts without the web framework.
    from starlette.types import ASGIApp
    from uvicorn import Config, Server

BACKLOG = 2_048
"""Maximum number of connections that wait to be accepted."""


async def serve_api(settings: Settings) -> None:
    """
    Serve the HTTP API until a signal.

    Raises:
        AddressTaken: Its port is in use.
        ServerUnfit: The database needs a migration or other settings.
    """
    from importlib.metadata import version
    from ipaddress import ip_address

    from asyncflow.api.app import create_app
    from asyncflow.api.catalogue import Catalogue
    from asyncflow.maintenance.watch import MaintenanceWatch
    from asyncflow.store.wakeups import Waker

    async with (
        _bound(settings) as listening,
        database(settings, "asyncflow api") as db,
        stop_signals(settings) as stop,
    ):
        await until_fit(db, settings, stop)
        async with Catalogue(db) as catalogue, MaintenanceWatch(db):
            waker = Waker(db)
            app = create_app(
                db=db,
                settings=settings,
                catalogue=catalogue,
                waker=waker,
                version=version("asyncflow"),
            )
            server = _server(_config(app, settings))
            stop.on_first = lambda: setattr(server, "should_exit", True)
            stop.on_second = lambda: setattr(server, "force_exit", True)
            if not stop.asked:
                # Before the log says so: until one listens, several sockets may be bound to a port.
                with _address_free(settings.api_host, settings.api_port):
                    listening.listen(BACKLOG)
                url = f"http://{address(settings.api_host, settings.api_port)}"
                events.process_started(url=url)
                if not ip_address(listening.getsockname()[0]).is_loopback:
                    events.api_unprotected(host=settings.api_host)
                # What is loaded by now stays. The garbage collector would search it again every
                # few seconds, and all requests would wait for 20 ms.
                gc.freeze()
                await server.serve(sockets=[listening])
            await waker.close()
    events.process_stopped()


def _config(app: ASGIApp, settings: Settings) -> Config:
    from uvicorn import Config

    from asyncflow.api.front.protocol import BoundedProtocol

    return Config(
        app,
        loop="none",
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # The source address of a request is not used.
        server_header=False,
        date_header=False,
        timeout_keep_alive=settings.api_keep_alive_seconds,  # type: ignore[arg-type]
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(settings.shutdown_grace_seconds),
    )


def _server(config: Config) -> Server:
    from uvicorn import Server

    class OurServer(Server):
        # Uvicorn would catch the signals itself and, once done, let them kill the process. This
        # one exits with 0.
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    return OurServer(config)


@asynccontextmanager
async def _bound(settings: Settings) -> AsyncIterator[socket.socket]:
    with listen(settings.api_host, settings.api_port) as listening:
        yield listening


def listen(host: str, port: int) -> socket.socket:
    """
    Bind the API's address, before the server would, so that a taken port is reported clearly.

    Raises:
        AddressTaken: It cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _address_free(host, port):
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
        except OSError:
            listening.close()
            raise
    return listening


@contextmanager
def _address_free(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AddressTaken(address(host, port), error.strerror or str(error)) from error
