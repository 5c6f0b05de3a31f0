"""What this machine is: device, memory, speed, and which packages are usable or why not."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import segments
from .errors import BackendUnavailableError, PlanError
from .presets import DISK_RATE, DevicePreset, devices
from .rates import measured, once

if TYPE_CHECKING:
    import torch

Kind = Literal["cuda", "cpu", "mps"]


@dataclass(frozen=True)
class Hardware:
    """A device and the host it sits in.

    Attributes:
        device: torch's name for it, "cuda:0", "cpu" or "mps"; a preset's name where it was not probed.
        kind: "cuda", "cpu" or "mps".
        name: the device's name for people.
        memory: bytes of device memory in all (of the host's, on a CPU).
        free: bytes of it that are free now.
        ram: bytes of host memory available now.
        cores: processor cores that this process may use.
        sm: CUDA compute capability as a number (89 for 8.9), or None.
        fast_dtypes: types whose matrix products run at the device's full rate, fastest first.
        flops: FLOP/s of a large matrix product per dtype, where measured or known; of "int8" and "float8_e4m3fn" where the device
            has instructions, and there is an implementation here that uses them.
        memory_rate: bytes/s of device memory, read plus written.
        link_rate: bytes/s from page-locked host memory to the device.
        disk_rate: bytes/s of reading weights' files; assumed.
        measured: whether the rates were measured here.
        source: where rates that were not are from.
        growing: of a CUDA device, whether torch's segments of its memory grow (:mod:`flux2_local.segments`).
    """

    device: str
    kind: Kind
    name: str
    memory: int
    free: int
    ram: int
    cores: int
    sm: int | None
    fast_dtypes: tuple[str, ...]
    flops: dict[str, float]
    memory_rate: float
    link_rate: float
    measured: bool
    disk_rate: float = DISK_RATE
    source: str = ""
    growing: bool = True

    def products(self, dtype: str) -> float:
        """FLOP/s of large matrix products in a compute type: float32's where that one's are not known."""
        return self.flops.get(dtype, self.flops["float32"])

    @property
    def described(self) -> bool:
        """Whether this is a preset's description of a machine that is not at hand."""
        return self.device.split(":")[0] != self.kind


ASSUMED_RAM = 64 * 2**30
"""Bytes of host memory that a described card is taken to have beside it where nobody says."""


def probe(device: str | None = None, measure: bool = False) -> Hardware:
    """Look at the machine. Rates that :mod:`flux2_local.rates` kept are used, else public figures.

    Args:
        device: "cuda", "cuda:1", "cpu", "mps", or None for the best there is.
        measure: measure the rates now, in a second or two, where none are kept for this device.

    Raises:
        PlanError: no such device here.
    """
    return (once if measure else measured)(look(device or default_device()))


def look(device: str) -> Hardware:
    """The device by its name and public figures."""
    import torch

    kind = device.split(":")[0]
    if kind == "cuda":
        return _probe_cuda(device)
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise PlanError("There is no Apple GPU (MPS) here. Leave --device out to use the best device there is.")
        rated = devices()["apple-m3-max"]
        total = torch.mps.recommended_max_memory()
        return _host(
            replace(rated, title="Apple GPU", memory=total),
            "mps",
            total - torch.mps.driver_allocated_memory(),
            ("float16",),
        )
    if kind == "cpu":
        return _probe_cpu()
    raise PlanError(f"{device!r} is not a device. Write cuda, cuda:1, cpu or mps.")


def default_device() -> str:
    """CUDA if there is one, else Apple's GPU, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _probe_cuda(device: str) -> Hardware:
    import torch
    from flux2_kernels.constraint import LEAST_SM, place_of

    if not torch.cuda.is_available():
        why = (
            "this torch was built without CUDA" if torch.version.cuda is None else "no NVIDIA driver or card was found"
        )
        raise PlanError(f"CUDA cannot be used: {why}. Run `flux2-local doctor` for details, or use --device cpu.")
    index = int(device.split(":")[1]) if ":" in device else 0
    if index >= torch.cuda.device_count():
        raise PlanError(
            f"There is no {device}; this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0."
        )
    facts = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None  # whose numbers are no compute capabilities
    sm = 0 if amd else facts.major * 10 + facts.minor
    gc.collect()
    torch.cuda.empty_cache()  # what this process holds and does not use is free
    free, total = torch.cuda.mem_get_info(index)
    rated = rate_of(facts.name, sm, facts.multi_processor_count)
    fast = ("bfloat16", "float16") if amd or sm >= 80 else ("float16",)
    growing = segments.grow(f"cuda:{index}")  # before a kernel is tried there: it asks for memory that is new
    kernels = place_of(f"cuda:{index}").triton and sm >= LEAST_SM  # without them plain torch quantizes rows
    rated = replace(rated, eight_bit=rated.eight_bit if kernels else {})
    found = _host(replace(rated, title=facts.name, memory=total, sm=sm), f"cuda:{index}", free, fast)
    return replace(found, growing=growing)


def rate_of(name: str, sm: int, processors: int) -> DevicePreset:
    """Rates of a card by its name, or guessed from its processors where ``devices.toml`` has no such card: those of 8-bit types
    are to the 16-bit one's as those of the newest card there that is no newer."""
    words = name.lower().replace("nvidia", "").replace("geforce", "").split()
    cards = [d for d in devices().values() if d.kind == "cuda"]
    best = max(cards, key=lambda d: sum(w in d.title.lower().split() for w in words))
    if all(w in best.title.lower().split() for w in words if any(c.isdigit() for c in w)):
        return best
    kin = max((d for d in cards if (d.sm or 0) <= sm), key=lambda d: d.sm or 0, default=None)
    per_processor = 1.3e12 if sm >= 89 else 0.87e12 if sm >= 80 else 0.5e12
    return replace(
        best,
        flops=per_processor * processors,
        memory_rate=4e11,
        link_rate=12e9,
        eight_bit=kin.eight_bit if kin else {},
        source=f"guessed from {processors} processors of compute capability {sm / 10:.1f}",
    )


def _probe_cpu() -> Hardware:
    ram, total = host_memory()
    fast = ("bfloat16", "float32") if has_fast_bfloat16() else ("float32",)
    rated = replace(devices()["cpu-8"], title=cpu_name(), memory=total)
    return _host(rated, "cpu", ram, fast)


def _host(rated: DevicePreset, device: str, free: int, fast: tuple[str, ...]) -> Hardware:
    cores = usable_cores()
    rates = cpu_rates(cores, fast) if rated.kind == "cpu" else card_rates(rated, fast)
    return Hardware(
        device=device,
        kind=rated.kind,
        name=rated.title,
        memory=rated.memory,
        free=free,
        ram=host_memory()[0],
        cores=cores,
        sm=rated.sm,
        fast_dtypes=fast,
        flops=rates,
        memory_rate=rated.memory_rate,
        link_rate=rated.link_rate,
        measured=False,
        disk_rate=rated.disk_rate,
        source="guessed from the instructions and cores that the processor has"
        if rated.kind == "cpu"
        else rated.source,
    )


def card_rates(rated: DevicePreset, fast: tuple[str, ...]) -> dict[str, float]:
    """FLOP/s per dtype of a card that runs ``fast`` types at its rate: a quarter of it in others, multiples in 8 bit."""
    eight = {name: multiple * rated.flops for name, multiple in rated.eight_bit.items()}
    return {**dict.fromkeys(fast, rated.flops), "float32": rated.flops / 4, **eight}


def cpu_rates(cores: int, fast: tuple[str, ...]) -> dict[str, float]:
    """Rough FLOP/s per dtype: 150 GFLOP/s a core in float32 with AVX-512 or AMX, 1 TFLOP/s in bf16 with AMX; int8 (VNNI, AMX) at twice
    the rate of bf16."""
    rates, flags = {"float32": 150e9 * cores}, cpu_flags()
    if "bfloat16" in fast:
        rates["bfloat16"] = (1000e9 if "amx_bf16" in flags else 300e9) * cores
    if flags & {"avx512_vnni", "amx_int8"}:
        rates["int8"] = (2000e9 if "amx_int8" in flags else 600e9) * cores
    return rates


def from_preset(name: str, ram: int | None = None) -> Hardware:
    """The hardware that ``devices.toml`` describes, for planning without having it.

    Args:
        name: of the preset.
        ram: bytes of host memory; where None a CPU's own, which the table has, and :data:`ASSUMED_RAM` beside anything else.

    Raises:
        PlanError: no such preset.
    """
    known = devices()
    if name not in known:
        raise PlanError(
            f"{name!r} is no device: this machine's are named cpu, cuda, cuda:1 and mps; a plan alone also knows "
            f"{', '.join(known)}."
        )
    row = known[name]
    modern = row.kind == "cuda" and (row.sm or 0) >= 80
    fast = ("float32",) if row.kind == "cpu" else ("bfloat16", "float16") if modern else ("float16",)
    found = Hardware(
        device=name,
        kind=row.kind,
        name=row.title,
        memory=row.memory,
        free=row.memory if row.kind == "cpu" else row.memory - 600 * 2**20,
        ram=row.memory if row.kind == "cpu" else ASSUMED_RAM,
        cores=os.cpu_count() or 1,
        sm=row.sm,
        fast_dtypes=fast,
        flops={"float32": row.flops} if row.kind == "cpu" else card_rates(row, fast),
        memory_rate=row.memory_rate,
        link_rate=row.link_rate,
        measured=False,
        disk_rate=row.disk_rate,
        source=row.source,
    )
    return found if ram is None else with_ram(found, ram)


def with_ram(hardware: Hardware, ram: int) -> Hardware:
    """The same with ``ram`` bytes of host memory, which are a CPU's own, all of them free."""
    given = replace(hardware, ram=ram)
    return replace(given, memory=ram, free=ram) if hardware.kind == "cpu" else given


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


ASKED = {
    "avx512f": "_is_avx512_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "avx512_vnni": "_is_vnni_supported",
    **dict.fromkeys(("amx_tile", "amx_bf16", "amx_int8"), "_is_amx_tile_supported"),
}
"""What torch is asked of instruction sets where the system does not list them; what has one of AMX has all three."""


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets that the processor has, by Linux's names."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as f:
            line = next((row for row in f if row.startswith(("flags", "Features"))), "")
    except OSError:
        import torch

        return frozenset(flag for flag, name in ASKED.items() if getattr(torch.cpu, name, bool)())
    return frozenset(line.partition(":")[2].split())


def has_fast_bfloat16() -> bool:
    """Whether bf16 matrix products have instructions of their own (AVX512-BF16, AMX, or Arm's BF16)."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def unfolds_convolutions(dtype: str) -> bool:
    """Whether torch computes this CPU's convolutions in ``dtype`` itself, since oneDNN has none for it here: it has none in bf16
    without AVX-512."""
    import torch

    if dtype == "float32":
        return False
    library = torch.ops.mkldnn
    supported = library._is_mkldnn_bf16_supported if dtype == "bfloat16" else library._is_mkldnn_fp16_supported
    return not (torch.backends.mkldnn.is_available() and supported())


def widens_attention(hardware: Hardware, dtype: str) -> bool:
    """Whether torch has no kernel for attention in ``dtype`` that does not write every score to memory: none for bf16 on cards before
    compute capability 8.0. Source: ``check_mem_efficient_hardware_support`` and the types beside it in
    ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``."""
    return dtype == "bfloat16" and 0 < (hardware.sm or 0) < 80


def widens_int8_weights() -> bool:
    """Whether torchao's int8 products add up the weights on this CPU, which makes them in 32 bit: with VNNI and without AMX. Source:
    ``_int_scaled_matmul_cpu`` in torchao's ``kernel/intmm.py``."""
    return "avx512_vnni" in cpu_flags() and "amx_tile" not in cpu_flags()


def cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as f:
            for row in f:
                if row.startswith("model name"):
                    return f"{row.partition(':')[2].strip()}, {show_cores()}"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, {show_cores()}"


def show_cores() -> str:
    """The processor cores that this process may use, in words."""
    cores = usable_cores()
    return f"{cores} core{'s' if cores != 1 else ''}"


CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", ""),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Where a container's limit stands in either version of control groups: folder, files of the limit and of what is used, and what rows
about kept files begin with in ``memory.stat``. Those files are used too, until something else needs their room."""


def host_memory() -> tuple[int, int]:
    """Bytes of host memory: available now, and in all. Container limits count."""
    try:
        with Path("/proc/meminfo").open(encoding="utf-8") as f:
            rows = {k: int(v.split()[0]) * 1024 for k, v in (row.split(":", 1) for row in f)}
        available, total = rows["MemAvailable"], rows["MemTotal"]
    except (OSError, KeyError, ValueError):
        if sys.platform == "win32":
            return windows_memory()
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = int(total * 0.7)
    for folder, limit_file, used_file, prefix in CGROUPS:
        try:
            limit, used = (int((folder / name).read_text("ascii")) for name in (limit_file, used_file))
            told = dict(row.split() for row in (folder / "memory.stat").read_text("ascii").splitlines())
            files = sum(int(told.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
        except (OSError, ValueError):
            continue
        if limit < total:
            return min(available, max(0, limit - (used - files))), limit
    return available, total


class MemoryStatus(ctypes.Structure):
    """Windows' ``MEMORYSTATUSEX``."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def windows_memory() -> tuple[int, int]:
    """As :func:`host_memory`, on Windows."""
    status = MemoryStatus(size=ctypes.sizeof(MemoryStatus))
    system: Any = ctypes
    system.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return status.available, status.total


@dataclass(frozen=True)
class Package:
    """An optional package: its version, or why it cannot be used."""

    name: str
    version: str | None
    problem: str = ""

    @property
    def usable(self) -> bool:
        return self.version is not None and not self.problem


def package(name: str, *, on: str | None = None, need: str = "") -> Package:
    """Whether a distribution is installed (it is not imported).

    Args:
        name: of the distribution.
        on: the kind of device at hand, where the package needs one.
        need: the kind of device that it needs.
    """
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name, None, f"not installed; pip install {name}")
    problem = f"needs a {need} device, and this is {on}" if need and on and on != need else ""
    return Package(name, version, problem)


def torch_device(hardware: Hardware) -> torch.device:
    """The torch device to run on.

    Raises:
        BackendUnavailableError: the hardware is a preset's, not this machine's.
    """
    import torch

    try:
        return torch.device(hardware.device)
    except RuntimeError:
        raise BackendUnavailableError(
            f"{hardware.device} is a description of a card, good for `flux2-local plan` only; to generate, use a device of "
            f"this machine."
        ) from None
