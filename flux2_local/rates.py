"""What a device reaches, measured once and kept in the cache folder; plans go by it instead of public figures.

The first load measures, in a second or two (:func:`once`), or ``flux2-local doctor --measure`` does (:func:`keep`). From then on what
is kept is used as it is, so that plans are the same every time, until the device, its driver or torch changes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PlanError
from .files import cache_folder, write
from .presets import EIGHT_BIT

if TYPE_CHECKING:
    from torch import Tensor

    from .hardware import Hardware

SWITCH = "FLUX2_LOCAL_MEASURE"
"""The environment variable that, set to 0, has plans go by public figures: nothing is measured, and nothing kept is used."""

SECONDS, ROUNDS = 0.15, 3
"""Spent on each rate, and the rounds in which all take turns: what else the machine does for a moment spoils one of them."""

UNWAITED = 0.005
"""Seconds of calls before one is waited for: waiting takes a tenth as long as a fast card's copy."""

COPIED, PRODUCT, SMALL = 2**28, {"cuda": 8192, "cpu": 2048}, 1024
"""What rates are measured on: bytes copied, more than caches hold, and the side of the matrices multiplied; that of a CPU with at
most :data:`FEW` threads, which would take seconds for the others."""

FEW = 8

LINKED = 2**27
"""Bytes of the copies from page-locked memory that the link's rate is measured on."""

ROOM = {"cuda": 5 * 2**29, "cpu": 2**30}
"""Bytes that must be free on the device, and within the user's budget, for :func:`once` to measure; it takes less."""

FAR = 10
"""A rate this many times above or below the public figure says more about the moment than about the device."""

PATIENCE = 30.0
"""Seconds that a process waits for another one that measures."""

log = logging.getLogger(__name__)


def measure(device: str, dtypes: Iterable[str], seconds: float = SECONDS) -> dict[str, float]:
    """What the device reaches in what bounds everything: bytes/s of a copy (read plus written) as ``copy``, FLOP/s of a square matrix
    product per dtype, and on a CUDA device bytes/s from page-locked host memory as ``link``; medians over ``seconds`` each.

    Args:
        device: "cuda", "cuda:1" or "cpu".
        dtypes: of the products, torch's names; int8's are summed in int32, and the others of 8 bit are left out where this torch
            or device has none.
    """
    import torch

    kind = "cuda" if device.startswith("cuda") else "cpu"
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target, few = torch.empty_like(source), kind == "cpu" and torch.get_num_threads() <= FEW
    side = SMALL if few else PRODUCT[kind]
    work: dict[str, tuple[float, Callable[[], Any]]] = {"copy": (2 * COPIED, lambda: target.copy_(source))}
    if kind == "cuda":
        host = torch.ones(LINKED, dtype=torch.uint8).pin_memory()
        work["link"] = LINKED, lambda: source[:LINKED].copy_(host)
    draw = torch.Generator(device).manual_seed(0)
    for dtype in dtypes:
        a, b = (torch.randn(side, side, device=device, generator=draw).to(getattr(torch, dtype)) for _ in range(2))
        call = multiplied(dtype, a, b)
        try:
            call()
        except RuntimeError:  # this torch or card has no such product
            if dtype in EIGHT_BIT:
                continue
            raise
        work[dtype] = 2.0 * side**3, call
    wait = (lambda: torch.cuda.synchronize(device)) if kind == "cuda" else (lambda: None)
    with torch.inference_mode():
        took = typical({name: call for name, (_, call) in work.items()}, wait, seconds)
    return {name: amount / took[name] for name, (amount, _) in work.items()}


def multiplied(dtype: str, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """The product of two matrices of one dtype; 8-bit ones lie as layers have them on a card, a weight's input channels together."""
    import torch

    if dtype == "float8_e4m3fn":
        one = torch.ones((), device=a.device)
        # Summed as in layers.
        return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    if dtype == "int8":  # bytes that overflow are multiplied as fast
        return lambda: torch._int_mm(a, b.t() if b.is_cuda else b)
    return lambda: torch.mm(a, b)


def typical(calls: dict[str, Callable[[], Any]], wait: Callable[[], None], seconds: float) -> dict[str, float]:
    """Median seconds of each call, over all of :data:`ROUNDS` in which they take turns.

    Args:
        calls: each is called twice before.
        wait: returns when what was called is done. It is called after as many calls as last :data:`UNWAITED`.
        seconds: for each of them, at least one call a round.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}

    def took(call: Callable[[], Any], count: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        return (time.perf_counter() - start) / count

    for call in calls.values():
        took(call)
    counts = {name: max(1, int(UNWAITED / took(call))) for name, call in calls.items()}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            end = time.perf_counter() + seconds / ROUNDS
            while True:
                found[name].append(took(call, counts[name]))
                if time.perf_counter() >= end:
                    break
    return {name: statistics.median(times) for name, times in found.items()}


def place(hardware: Hardware) -> Path:
    """The file of a device's rates: the machine, the device, its memory, its threads or driver, and torch's version decide."""
    import torch

    own = (hardware.cores, torch.get_num_threads()) if hardware.kind == "cpu" else driver()
    facts = [hardware.name, hardware.kind, own, round(hardware.memory / 2**30), platform.machine(), torch.__version__]
    return cache_folder("rates") / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"


def driver() -> str:
    """The version of the NVIDIA driver, or of the CUDA that it brings; "" where the system says neither."""
    import torch

    try:
        return Path("/proc/driver/nvidia/version").read_text("utf-8").partition("\n")[0]
    except OSError:
        version = getattr(torch._C, "_cuda_getDriverVersion", None)
        return str(version()) if version is not None and torch.cuda.is_available() else ""


def off() -> bool:
    """Whether :data:`SWITCH` says that plans go by public figures."""
    return os.environ.get(SWITCH) == "0"


def measured(hardware: Hardware) -> Hardware:
    """``hardware`` with the rates that were kept for it; as it is where there are none, or :data:`SWITCH` is off. 8-bit rates of a
    card that were not kept are the public multiples of the 16-bit one that was."""
    if off():
        return hardware
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
    """Measure a CPU or a CUDA device and keep its rates, whatever they are, in about a second; ``hardware`` with them.

    Raises:
        PlanError: another kind of device, or :data:`SWITCH` is off.
        OutputError: they could not be written.
    """
    if hardware.kind == "mps":
        raise PlanError("Only CPUs and CUDA devices can be measured. Leave --measure out.")
    if off():
        raise PlanError(
            f"{SWITCH}=0 has plans go by public figures, so nothing is measured. Unset it, or leave --measure out."
        )
    write(place(hardware), json.dumps(measure(hardware.device, hardware.flops)).encode())
    return measured(hardware)


def once(hardware: Hardware) -> Hardware:
    """``hardware`` with the rates that were kept for it, which are measured now if nobody has.

    As it is where :data:`SWITCH` is off, where there is no room to measure or no folder to keep rates in, and where they are out of
    all reason: that is logged, and kept too. Nothing that goes wrong is an error.
    """
    known = measured(hardware)
    if known.measured or off() or hardware.kind == "mps" or hardware.free < ROOM[hardware.kind]:
        return known
    path = place(hardware)
    try:
        from huggingface_hub.utils import WeakFileLock

        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_suffix(".lock"), timeout=PATIENCE):
            if not settled(path):
                log.info("measuring the rates of %s, once", hardware.name)
                write(path, json.dumps(believed(hardware, measure(hardware.device, hardware.flops))).encode())
                give_back(hardware)
    except Exception as error:
        log.info("the rates of %s could not be measured: %s", hardware.name, error)
    return measured(hardware)


def settled(path: Path) -> bool:
    """Whether rates, or that they were discarded, can be read from the file."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and ("copy" in found or "discarded" in found)


def believed(hardware: Hardware, found: dict[str, float]) -> dict[str, Any]:
    """What to keep of measured rates: all of them, or that they were discarded since one is :data:`FAR` from what is known."""
    public = {**hardware.flops, "copy": hardware.memory_rate, "link": hardware.link_rate}
    far = [name for name, rate in found.items() if not public[name] / FAR <= rate <= public[name] * FAR]
    if not far:
        return dict(found)
    log.warning(
        "What was measured on %s is more than %d times off the figures known of it (%s), so plans go by those. "
        "`flux2-local doctor --measure` measures again, and keeps whatever it finds.",
        hardware.name,
        FAR,
        ", ".join(f"{name} {found[name]:.3g} instead of {public[name]:.3g}" for name in far),
    )
    return {"discarded": found}


def give_back(hardware: Hardware) -> None:
    """Give the device memory that measuring took back to the system."""
    if hardware.kind == "cuda":
        import torch

        torch.cuda.empty_cache()
