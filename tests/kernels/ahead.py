"""Every launch that a kept configuration leads to, on tensors without memory: what is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from flux2_kernels import OPS, Case, Op, choose
from flux2_kernels.constraint import Place
from flux2_kernels.gpu import (
    gated_residual,
    library,
    linear_w4,
    linear_w8a8,
    modulated_norm,
    qk_norm_rope,
    quantize_rows,
    swiglu,
)
from flux2_kernels.gpu.aot import SHARED_LIMIT, compile_for, source_of
from flux2_kernels.gpu.launch import Launch, empty_quantized
from flux2_kernels.op import Inputs
from flux2_kernels.registry import KernelUnavailable
from flux2_kernels.tables import table
from torch import Tensor

META = torch.device("meta")
SIZES = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K", "HEADS", "HADAMARD", "TOTAL", "GATED", "PARTS")
SHARED_KERNELS = {
    "linear_w8a8_int8": "linear_w8a8",
    "linear_w8a8_fp8": "linear_w8a8",
    "linear_w4a16": "linear_w4",
    "linear_w4a8": "linear_w4",
}


@dataclass(frozen=True)
class Compilation:
    """One launch on one SM: the kernel's name, what sets it apart, and the launch."""

    sm: int
    kernel: str
    label: str
    launch: Launch

    def __str__(self) -> str:
        return f"sm_{self.sm}-{self.kernel}-{self.label}"


def like(x: Tensor, width: int | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] if width is None else width))


def norm(i: Inputs, at: int) -> Launch:
    return modulated_norm.launch(i["x"], i["shift"], i["scale"], like(i["x"]), None, at)


def norm_quantized(i: Inputs, at: int) -> Launch:
    values, scales = empty_quantized(i["x"], i["x"].shape[2], i["dtype"])
    return modulated_norm.launch(i["x"], i["shift"], i["scale"], values, scales, at)


def residual(i: Inputs, at: int) -> Launch:
    return gated_residual.launch(i["x"], i["gate"], i["y"], like(i["x"]), at)


def residual_norm(i: Inputs, at: int) -> Launch:
    out = empty_quantized(i["x"], i["x"].shape[2], i["dtype"]) if "dtype" in i else (like(i["x"]), None)
    modulation = (i["shift"], i["scale"])
    return gated_residual.launch_norm(i["x"], i["gate"], i["y"], modulation, like(i["x"]), out, at)


def rope(i: Inputs, at: int) -> Launch:
    q, k = ((i[n], i[f"{n}_weight"], torch.empty(i[n].shape, dtype=i[n].dtype, device=META)) for n in ("q", "k"))
    return qk_norm_rope.launch(q, k, i["cos"], i["sin"], at)


def activation(i: Inputs, at: int) -> Launch:
    return swiglu.launch(i["x"], like(i["x"], i["x"].shape[2] // 2), at)


def activation_quantized(i: Inputs, at: int) -> Launch:
    width = i["x"].shape[2] // 2 + (0 if i["left"] is None else i["left"].shape[2])
    return swiglu.launch_quantized(i["x"], i["left"], *empty_quantized(i["x"], width, i["dtype"]), at)


def rows(i: Inputs, at: int) -> Launch:
    return quantize_rows.launch(i["x"], i["hadamard"], *empty_quantized(i["x"], i["x"].shape[2], i["dtype"]), at)


def product(i: Inputs, at: int) -> Launch:
    config = linear_w8a8.kept_config(i["x"], i["w"], at)
    gated = (i["gate"], i["residual"]) if "gate" in i else None
    out = i["x"].new_empty((*i["x"].shape[:2], i["w"].shape[0]), dtype=i["residual"].dtype if gated else i["dtype"])
    return linear_w8a8.launch((i["x"], i["x_scale"]), (i["w"], i["w_scale"]), out, gated, config)


def scaled_sums(i: Inputs, at: int) -> Launch:
    gated = (i["gate"], i["residual"]) if "gate" in i else None
    out = i["x"].new_empty((*i["x"].shape[:2], i["w"].shape[0]), dtype=i["residual"].dtype if gated else i["dtype"])
    total = out.new_empty(out.shape, dtype=torch.int32).flatten(0, 1)
    return library.launch(total, (i["x_scale"], i["w_scale"]), out, gated, at)


def packed_product(i: Inputs, at: int) -> Launch:
    dtype = i.get("dtype", i["x"].dtype)
    out = i["x"].new_empty((*i["x"].shape[:2], i["w"].shape[0]), dtype=dtype)
    config = linear_w4.kept_config(i["x"], i["w"], at)
    return linear_w4.launch(i["x"], i.get("x_scale"), i["w"], i["w_scale"], out, config)


Build = Callable[[Inputs, int], Launch]
BUILD: dict[tuple[str, str], Build] = {
    ("modulated_norm", "triton"): norm,
    ("modulated_norm_quantized", "triton"): norm_quantized,
    ("gated_residual", "triton"): residual,
    ("gated_residual_norm", "triton"): residual_norm,
    ("gated_residual_norm_quantized", "triton"): residual_norm,
    ("qk_norm_rope", "triton"): rope,
    ("swiglu", "triton"): activation,
    ("swiglu_quantized", "triton"): activation_quantized,
    ("quantize_rows", "triton"): rows,
    ("linear_w8a8", "triton"): product,
    ("linear_w8a8_gated", "triton"): product,
    ("linear_w8a8", "int_mm"): scaled_sums,
    ("linear_w8a8_gated", "int_mm"): scaled_sums,
    ("linear_w4a16", "triton"): packed_product,
    ("linear_w4a8", "triton"): packed_product,
}


def cases(op: Op) -> Iterator[Case]:
    """The models' shapes; also few rows, the widest row, and one picture in a batch with gates of its own."""
    yield from op.shapes
    dims = op.shapes[0].dims
    if op.name.startswith("linear"):
        yield Case("text", {**dims, "tokens": 512})
        yield from (Case(f"uneven-{t}", {**dims, "tokens": t, "n": 6152}) for t in (dims["tokens"], 512))
    if "width" in dims:
        yield Case("widest", {**dims, "width": 32768 if op.name == "quantize_rows" else 16384})
        yield Case("narrow", {**dims, "width": 2048})
    if op.name == "quantize_rows":
        yield from (Case(f"rotated-{w}", {**dims, "width": w, "hadamard": 128}) for w in (2048, 6144))
    if op.name == "linear_w8a8_gated":
        yield Case("batch", {**dims, "batch": 2})


def compilations(sm: int) -> list[Compilation]:
    """What ``sm`` compiles, each binary once."""
    found: dict[str, Compilation] = {}
    for (name, implementation), build in BUILD.items():
        op = OPS[name]
        for form in op.formats:
            for case in cases(op):
                try:
                    choose(name, Place("cuda", sm, triton=True), form, case.dims, implementation)
                except KernelUnavailable:
                    continue
                launch = build(op.inputs(case, form, META, None), sm)  # type: ignore[arg-type]
                source = source_of(launch)
                key = f"{source.signature}{source.constants}{source.attrs}{launch.options}{launch.kernel}"
                label = f"{form}-{case.name}"
                found.setdefault(key, Compilation(sm, launch.kernel.__name__, label, launch))
    return list(found.values())


def representative(everything: list[Compilation]) -> list[Compilation]:
    """One launch for each kernel and configuration: in bf16 where it is used there, and of those the last, which has the most in
    its epilogue."""
    chosen: dict[tuple[Any, ...], Compilation] = {}
    for one in sorted(everything, key=lambda one: one.label.startswith("bfloat16")):
        sizes = (f"{name} {value}" for name, value in one.launch.constants.items() if name in SIZES)
        options = (f"{name} {value}" for name, value in one.launch.options.items())
        chosen[(one.kernel, *sizes, *options)] = one
    return list(chosen.values())


def left_out(sm: int, compiled: list[Compilation]) -> list[str]:
    """The entries of the SM's table that no launch in ``compiled`` uses."""
    missing = []
    for name, entries in table(sm)["configs"].items():
        kernel = SHARED_KERNELS.get(name, name)
        for entry in entries:
            wanted = {k: v for k, v in entry.items() if k not in ("equal", "at_most", "descriptors")}
            launches = (c.launch for c in compiled if c.kernel.startswith(kernel))
            if not any(wanted.items() <= (launch.constants | launch.options).items() for launch in launches):
                missing.append(f"{name} {entry}")
    return missing


@dataclass(frozen=True)
class Result:
    """What one binary uses, and the most shared memory that its SM gives a program."""

    name: str
    registers: int
    spills: int
    stack: int
    shared: int
    limit: int

    @property
    def wrong(self) -> bool:
        return bool(self.spills or self.stack) or self.shared > self.limit

    def __str__(self) -> str:
        used = f"{self.registers} registers, {self.spills} spills, {self.stack} bytes of stack"
        return f"{self.name}: {used}, {self.shared} of {self.limit} bytes of shared memory"


def compile_all(sm: int, everything: bool) -> list[Result]:
    """Compile for ``sm``: every launch, or one a kernel and configuration."""
    found = compilations(sm)
    chosen = found if everything else representative(found)
    if missing := left_out(sm, chosen):
        raise AssertionError(f"never compiled: {missing}")
    results = []
    for one in chosen:
        binary = compile_for(one.launch, sm)
        used = (binary.registers, binary.spills, binary.stack, binary.shared)
        results.append(Result(str(one), *used, SHARED_LIMIT[sm]))
    return results
