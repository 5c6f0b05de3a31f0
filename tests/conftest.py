"""Shared fixtures: small random models in the hub layout, the bundled model loaded once, and no way to the network."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["FLUX2_LOCAL_MEASURE"] = "0"  # plans go by public figures here, whatever was measured on this machine
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # pytest -n: the processor's cores are shared
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes minutes unless -m names it: pytest -m slow."""
    if "slow" in config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session", autouse=True)
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty hub cache, so that nothing depends on what this machine has downloaded."""
    from huggingface_hub import constants

    folder = tmp_path_factory.mktemp("hub")
    patch = pytest.MonkeyPatch()
    patch.setattr(constants, "HF_HUB_CACHE", str(folder))
    patch.setenv("HF_HUB_CACHE", str(folder))
    patch.setenv("HF_HOME", str(folder.parent))
    patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    yield folder
    patch.undo()


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail any connection that leaves the machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        assert host in ("127.0.0.1", "localhost", "::1", ""), f"a test connected to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def dev_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from components import save_dev

    return save_dev(tmp_path_factory.mktemp("models") / "dev")


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from components import save_klein

    return save_klein(tmp_path_factory.mktemp("models") / "klein", distilled=True)


@pytest.fixture(scope="session")
def klein_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from components import save_klein

    return save_klein(tmp_path_factory.mktemp("models") / "klein-base", distilled=False)


@pytest.fixture(scope="session")
def klein_kv_folder(tmp_path_factory: pytest.TempPathFactory, klein_folder: Path) -> Path:
    from components import save_klein_kv

    return save_klein_kv(tmp_path_factory.mktemp("models") / "klein-kv", klein_folder)


@pytest.fixture(scope="session")
def tiny():  # type: ignore[no-untyped-def]
    """The bundled model, standard."""
    from flux2_local import Flux2

    return Flux2.load("tiny")


@pytest.fixture(scope="session")
def flash():  # type: ignore[no-untyped-def]
    """The bundled model, flash: the quickest way to a real picture."""
    from flux2_local import Flux2

    return Flux2.load("tiny", "flash")


@pytest.fixture(scope="module")
def browser():  # type: ignore[no-untyped-def]
    """A headless Chromium."""
    driver = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'flux2-local[test]'"
    )
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
