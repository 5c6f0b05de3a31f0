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

from .. import files

ROOT = Path(__file__).parent.parent.parent
CHECKOUT = (ROOT / "benchmarks" / "results").is_dir()
RESULTS = ROOT / "benchmarks" / "results" if CHECKOUT else Path()
"""Where results go that nobody names a place for: a source checkout's folder, or the current one."""

PACKAGES = (
    "flux2-local", "torch", "diffusers", "transformers", "triton", "torchao", "optimum-quanto", "xformers", "cache-dit",
    "safetensors", "accelerate", "numpy", "stable-diffusion-cpp-python",
)  # fmt: skip

INSTRUCTIONS = ("avx", "amx", "fma", "asimd", "bf16", "i8mm", "sve")
"""How the names of those instruction sets begin that matrix products may use, on x86 and on Arm."""

DRIVER = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
"""What nvidia-smi is asked about a card."""


def said(*command: str) -> str:
    """The first line that a command prints; empty if there is no such command."""
    if shutil.which(command[0]) is None:
        return ""
    folder = ROOT if CHECKOUT else None
    return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip().partition("\n")[0]


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
    if CHECKOUT:
        yield "commit", said("git", "rev-parse", "HEAD")
        yield "changed", bool(said("git", "status", "--porcelain", "--untracked-files=no"))


def record(device: str = "cpu") -> dict[str, Any]:
    """Software, the host, and the card where ``device`` is one."""
    return dict(software()) | dict(host()) | (dict(card(device)) if device.startswith("cuda") else {})


def host() -> Iterator[tuple[str, Any]]:
    """The processor with its instruction sets for arithmetic, the threads that torch takes, and the memory in all, bytes."""
    import torch

    from ..hardware import cpu_flags, host_memory

    yield "device", processor()
    yield "instructions", " ".join(sorted(flag for flag in cpu_flags() if flag.startswith(INSTRUCTIONS)))
    yield "threads", torch.get_num_threads()
    yield "ram", host_memory()[1]


def card(device: str) -> Iterator[tuple[str, Any]]:
    """The name, driver and limits of the CUDA device ``device``."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    yield "card", properties.name
    yield "card_bytes", properties.total_memory
    yield "cuda", torch.version.cuda
    yield DRIVER, said("nvidia-smi", f"--query-gpu={DRIVER}", "--format=csv,noheader")


def place(figures: dict[str, Any], kind: str) -> Path:
    """``KIND-DATE.json`` in :data:`RESULTS`."""
    return RESULTS / f"{kind}-{figures['date'][:10]}.json"


def keep(figures: dict[str, Any], kind: str, path: Path | None) -> Path:
    """Write a record with its figures as JSON to ``path``, or to its :func:`place`; returns the path.

    Raises:
        OutputError: it could not be written.
    """
    path = path or place(figures, kind)
    return files.write(path, (json.dumps(figures, indent=2) + "\n").encode())


def processor() -> str:
    """The processor's name and how many of its cores this process may use."""
    from ..hardware import show_cores

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {show_cores()}"
