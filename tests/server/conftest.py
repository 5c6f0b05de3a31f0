"""One server for all tests that do not need a special one; all run the bundled model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness import Server


@pytest.fixture(scope="session")
def session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from harness import Server

    server = Server(tmp_path_factory.mktemp("server") / "data", "--no-safety-checker", "--tls")
    server.wait_ready()
    yield server
    assert server.stop() == 0, "".join(server.complained)
    assert "Traceback" not in "".join(server.complained), "".join(server.complained)


@pytest.fixture
def server(session_server: Server) -> Iterator[Server]:
    """A ready server with an empty queue."""
    session_server.idle()
    yield session_server
    assert session_server.process.poll() is None, "".join(session_server.complained)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with options of their own; they end with the test."""
    from harness import Server

    servers: list[Server] = []

    def begin(*options: str) -> Server:
        servers.append(Server(tmp_path / "data", "--no-safety-checker", *options))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()
