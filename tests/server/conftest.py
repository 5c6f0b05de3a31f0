"""One server for all tests that do not need a special one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness import Server


@pytest.fixture(scope="session")
def session_server(tmp_path_factory: pytest.TempPathFactory, klein_folder: Path) -> Iterator[Server]:
    from harness import Server

    server = Server(tmp_path_factory.mktemp("server") / "data", klein_folder, "--no-safety-checker", "--tls")
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
def start(tmp_path: Path, klein_folder: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with options of their own; they end with the test."""
    from harness import Server

    servers: list[Server] = []

    def begin(*options: str, model: Path | str | None = None, folder: Path | None = None) -> Server:
        servers.append(Server(folder or tmp_path / "data", model or klein_folder, "--no-safety-checker", *options))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop()
