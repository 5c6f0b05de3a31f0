"""Compile a launch for any SM without a GPU and read what the binary uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel uses.

    Attributes:
        registers: per thread.
        stack: bytes of stack per thread; spilled registers live there.
        spills: instructions that store to or load from local memory.
        shared: bytes of shared memory per program.
        ptx, sass: the code.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    ptx: str
    sass: str


def _argument(value: Any) -> tuple[str, Any, bool]:
    """(type, constant or None, divisible by 16) of a run-time argument, as the launcher specialises it."""
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr", value, False
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype], None, (value.storage_offset() * value.element_size()) % 16 == 0
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", None, value % 16 == 0
    if isinstance(value, float):
        return "fp32", None, False
    block = ",".join(map(str, value.block_shape))
    return f"tensordesc<{TYPES[value.base.dtype]}[{block}]>", None, False


def source_of(launch: Launch) -> ASTSource:
    """What Triton compiles for this launch."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, name in enumerate(launch.kernel.arg_names):
        if name in launch.constants:
            signature[name] = "constexpr"
            continue
        signature[name], constant, divisible = _argument(launch.args[name])
        if signature[name] == "constexpr":
            constants[name] = constant
        elif divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def compile_for(launch: Launch, sm: int) -> Binary:
    """Compile to machine code for ``sm`` (80, 86, 89, 90, 100 or 120)."""
    compiled = triton.compile(source_of(launch), target=GPUTarget("cuda", sm, 32), options=dict(launch.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("cuobjdump", "-sass", file.name)
    figures = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Binary(
        registers=figures["REG"],
        stack=figures["STACK"] + figures.get("LOCAL", 0),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        sass=sass,
    )


def _tool(name: str, *arguments: str) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
