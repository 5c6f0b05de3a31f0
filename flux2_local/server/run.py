"""Running the server: sockets, both protocols, signals, and the lines to paste."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import uvicorn

from ..errors import Flux2Error
from ..files import check_folder, reason
from .app import make_app
from .desk import ROOM
from .gate import Gate
from .lines import greeting
from .settings import Settings
from .store import Store
from .tls import Certificates, make_certificates

BACKLOG = 1024
GRACE_SECONDS = 2


class _Server(uvicorn.Server):
    """uvicorn, with the signals left to us: there may be two of them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> None:
    """Serve until a signal comes.

    Raises:
        Flux2Error: the address is taken, the folder cannot be used, or no model can be loaded.
    """
    check_folder(settings.folder, ROOM, "--folder")
    plain = bind(settings.host, settings.port)
    settings = replace(settings, port=plain.getsockname()[1])
    secure, certificates = None, None
    if settings.tls_port is not None:
        certificates = make_certificates(settings.folder / "tls", settings.host)
        secure = bind(settings.host, settings.tls_port)
        settings = replace(settings, tls_port=secure.getsockname()[1])
    gate = make_app(settings, Store(settings.folder / "queue.sqlite"), settings.port)
    asyncio.run(_serve(gate, plain, secure, certificates))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        Flux2Error: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Flux2Error(
            f"{host}:{port} cannot be listened on: {reason(error)}. Choose another one with --port."
        ) from error
    # Connections inherit it. Without it an answer's body waits 40 ms for the acknowledgement of its head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


async def _serve(
    gate: Gate, plain: socket.socket, secure: socket.socket | None, certificates: Certificates | None
) -> None:
    common: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "timeout_graceful_shutdown": GRACE_SECONDS,
        "timeout_keep_alive": 75,
    }
    servers = [_Server(uvicorn.Config(gate, lifespan="on", **common))]
    if certificates is not None:
        files: dict[str, Any] = {"ssl_certfile": certificates.certificate, "ssl_keyfile": certificates.key}
        servers.append(_Server(uvicorn.Config(gate, lifespan="off", **files, **common)))

    def stop(*_: Any) -> None:
        for server in servers:
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    tasks = [asyncio.create_task(servers[0].serve(sockets=[plain]))]
    while not servers[0].started and not tasks[0].done():
        await asyncio.sleep(0.02)
    if not tasks[0].done():
        print(greeting(gate.settings, certificates), flush=True)
        desk = gate.desk
        desk.failed.add_done_callback(stop)
        if secure is not None:
            tasks.append(asyncio.create_task(servers[1].serve(sockets=[secure])))
        await asyncio.gather(*tasks)
        if desk.failed.done():
            desk.failed.result()
    await asyncio.gather(*tasks)
