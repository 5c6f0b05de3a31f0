"""What a reader needs to repeat a figure, or to doubt it."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "diffusers", "transformers", "triton", "torchao", "optimum-quanto", "xformers", "safetensors")


def said(*command: str) -> str:
    """The first line that a command prints; empty if there is no such command."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip().partition("\n")[0]


def software() -> Iterator[tuple[str, Any]]:
    """Date, versions, and the state of the source tree."""
    yield "date", time.strftime("%Y-%m-%dT%H:%M:%S%z")
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue
    yield "python", platform.python_version()
    yield "system", platform.platform()
    yield "commit", said("git", "rev-parse", "HEAD")
    yield "changed", bool(said("git", "status", "--porcelain", "--untracked-files=no"))


def record() -> dict[str, Any]:
    """Software and processor."""
    return dict(software()) | {"device": processor()}


def keep(figures: dict[str, Any], kind: str, path: Path | None) -> Path:
    """Write a record with its figures as JSON to ``path``, or to ``benchmarks/results/KIND-DATE.json``; returns the path."""
    path = path or RESULTS / f"{kind}-{figures['date'][:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")
    return path


def processor() -> str:
    """The processor's name and how many of its cores this process may use."""
    from flux2_local.hardware import usable_cores

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {usable_cores()} cores"
