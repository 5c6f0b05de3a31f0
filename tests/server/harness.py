"""A real server process on loopback, and how tests speak to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "cryptography"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'flux2-local[server]'")

COMMAND = [sys.executable, "-c", "from flux2_local.cli import main; main()", "serve"]
STANDARD, TURBO, FLASH = "fal-ai/flux-2", "fal-ai/flux-2/turbo", "fal-ai/flux-2/flash"
EDIT = "fal-ai/flux-2/edit"
SMALL = {"prompt": "a boat", "image_size": "square"}
LONG = {
    "prompt": "a boat",
    "image_size": "square_hd",
    "num_inference_steps": 50,
    "num_images": 4,
    "acceleration": "none",
}
"""Long enough to be met while it runs, and measured against: most of a minute on two cores."""


class Server:
    """``flux2-local serve`` in a process of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.command = [*COMMAND, "--port", "0", "--folder", str(folder), "--model", "tiny", *options]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.said: list[str] = []
        self.complained: list[str] = []
        for stream, lines in ((self.process.stdout, self.said), (self.process.stderr, self.complained)):
            threading.Thread(target=lines.extend, args=(stream,), daemon=True).start()
        deadline = time.monotonic() + 300
        while (
            found := re.search(r"listening on (http://\S+)", "".join(self.said))
        ) is None or "proxyUrl" not in "".join(self.said):
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(self.complained)
            time.sleep(0.05)
        self.url = found[1]
        self.client = httpx.Client(base_url=self.url, timeout=300)

    @property
    def text(self) -> str:
        return "".join(self.said)

    @property
    def tls(self) -> str:
        found = re.search(r"FAL_RUN_HOST=(\S+)", self.text)
        assert found is not None
        return found[1]

    def wait_ready(self, seconds: float = 300) -> None:
        self.until(lambda: self.client.get("/ready").status_code == 200, seconds)

    def until(self, condition: Any, seconds: float = 300) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "".join(self.complained)
            time.sleep(0.05)
        return value

    def run(self, endpoint: str = FLASH, **arguments: Any) -> httpx.Response:
        return self.client.post(f"/{endpoint}", json={**SMALL, **arguments})

    def submit(self, endpoint: str = FLASH, **arguments: Any) -> dict[str, Any]:
        answer = self.client.post(f"/queue/{endpoint}", json={**SMALL, **arguments})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status(self, job: dict[str, Any], logs: bool = True) -> dict[str, Any]:
        answer = self.client.get(f"/queue/{STANDARD}/requests/{job['request_id']}/status", params={"logs": logs})
        assert answer.status_code in (200, 202), answer.text
        return answer.json()

    def result(self, job: dict[str, Any], seconds: float = 300) -> httpx.Response:
        self.until(lambda: self.status(job)["status"] == "COMPLETED", seconds)
        return self.client.get(f"/queue/{STANDARD}/requests/{job['request_id']}")

    def cancel(self, job: dict[str, Any]) -> httpx.Response:
        return self.client.put(f"/queue/{STANDARD}/requests/{job['request_id']}/cancel")

    def running(self, job: dict[str, Any]) -> None:
        """Wait until a job has made a step."""
        self.until(lambda: any("step " in log["message"] for log in self.status(job)["logs"]))

    def idle(self) -> None:
        """Wait until nothing runs or waits."""
        self.until(lambda: self.client.get("/api/info").json()["queue"] == {"waiting": 0, "limit": 100, "busy": False})

    def kill(self) -> None:
        """As the out-of-memory killer would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """As Ctrl-C would; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise
        return self.process.returncode
