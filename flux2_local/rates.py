"""What a device reaches, measured once by whoever asks for it (``flux2-local doctor --measure``) and kept in the cache folder.

Nothing is measured on the way to a picture: plans go by what is kept, so that they are the same every time, else by public figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PlanError
from .files import cache_folder, write
from .presets import EIGHT_BIT

if TYPE_CHECKING:
    from .hardware import Hardware

SECONDS = 0.15
"""Spent on each rate."""

COPIED, PRODUCT = {"cuda": 2**30, "cpu": 2**28}, {"cuda": 8192, "cpu": 2048}
"""What rates are measured on: bytes copied, and the side of the matrices multiplied."""

LINKED = 2**27
"""Bytes of the copies from page-locked memory that the link's rate is measured on."""


def measure(device: str, dtypes: Iterable[str], seconds: float = SECONDS) -> dict[str, float]:
    """What the device reaches in what bounds everything: bytes/s of a copy (read plus written) as ``copy``, FLOP/s of a square matrix
    product per dtype, and on a CUDA device bytes/s from page-locked host memory as ``link``; medians over ``seconds`` each.

    Args:
        device: "cuda", "cuda:1" or "cpu".
        dtypes: of the products, torch's names; int8's are summed in int32, and the others of 8 bit are left out where this torch
            or device has none.
    """
    import torch
    from torch.utils.benchmark import Timer

    kind = "cuda" if device.startswith("cuda") else "cpu"

    def median(code: str, **names: Any) -> float:
        timer = Timer(code, globals=names, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=seconds).median)

    source = torch.ones(COPIED[kind], dtype=torch.uint8, device=device)
    found = {"copy": 2 * source.numel() / median("b.copy_(a)", a=source, b=torch.empty_like(source))}
    if kind == "cuda":
        host = torch.empty(LINKED, dtype=torch.uint8, pin_memory=True)
        found["link"] = LINKED / median("b.copy_(a)", a=host, b=source[:LINKED])
    del source
    for dtype in dtypes:
        a, b = (torch.randn(PRODUCT[kind], PRODUCT[kind], device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = "mm(a, b)" if dtype == "int8" else "a @ b"  # bytes that overflow are multiplied as fast
        names: dict[str, Any] = {"a": a, "b": b, "mm": torch._int_mm}
        if kind == "cuda" and dtype in EIGHT_BIT:
            names["b"] = b.t()  # the layout of weights, and the only one that fp8 has
        if dtype == "float8_e4m3fn":
            product, one = "mm(a, b, scale_a=one, scale_b=one, out_dtype=to)", torch.ones((), device=device)
            names |= {"mm": torch._scaled_mm, "one": one, "to": torch.bfloat16}
        try:
            found[dtype] = 2 * PRODUCT[kind] ** 3 / median(product, **names)
        except RuntimeError:
            if kind == "cpu" or dtype not in EIGHT_BIT:
                raise
    return found


def place(hardware: Hardware) -> Path:
    """The file of a device's rates: its name, its cores or driver, and torch's version decide."""
    import torch

    facts = [hardware.name, hardware.kind, hardware.cores if hardware.kind == "cpu" else driver(), torch.__version__]
    return cache_folder("rates") / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def driver() -> str:
    """The version of the NVIDIA driver, "" where the system does not say."""
    try:
        return Path("/proc/driver/nvidia/version").read_text("utf-8").partition("\n")[0]
    except OSError:
        return ""


def measured(hardware: Hardware) -> Hardware:
    """``hardware`` with the rates that were kept for it; as it is where there are none. 8-bit rates of a card that were not kept are
    the public multiples of the 16-bit one that was."""
    try:
        found = json.loads(place(hardware).read_bytes())
        rates = {name: float(rate) for name, rate in found.items() if float(rate) > 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return hardware
    fast = hardware.fast_dtypes[0]
    if hardware.kind == "cuda" and fast in rates:
        for name in EIGHT_BIT.keys() & hardware.flops.keys():
            rates.setdefault(name, hardware.flops[name] * rates[fast] / hardware.flops[fast])
    if not {"copy", *hardware.flops} <= rates.keys():
        return hardware
    return replace(
        hardware,
        flops={dtype: rates[dtype] for dtype in hardware.flops},
        memory_rate=rates["copy"],
        link_rate=rates.get("link", hardware.link_rate),
        measured=True,
    )


def keep(hardware: Hardware) -> Hardware:
    """Measure a CPU or a CUDA device and keep its rates, in about a second; ``hardware`` with them.

    Raises:
        PlanError: another kind of device.
        OutputError: they could not be written.
    """
    if hardware.kind == "mps":
        raise PlanError("Only CPUs and CUDA devices can be measured. Leave --measure out.")
    write(place(hardware), json.dumps(measure(hardware.device, hardware.flops)).encode())
    return measured(hardware)
