"""Bytes, operations and roofline time of each kernel at FLUX.2's shapes, per device of configs/devices.toml.

    python scripts/roofline.py                     # every model and device
    python scripts/roofline.py --device rtx-4090   # one device
    python scripts/roofline.py --csv               # the same table for a program

No device is needed: the figures come from the ops' own counts and the vendors' data sheets, each product's rate times the share
of it that large matmuls reach. Where the file does not say that a share was measured it is assumed, and a device may be faster
than its time here by as much as it exceeds that share; `scripts/gpu.py` measures a card's own. On CPUs and Apple's chips, which
run the ops as torch's own operators, it says what fusing them as the kernels do would leave.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels"))

from flux2_kernels import OPS, Case, Format, Op  # noqa: E402
from flux2_kernels.constraint import FP8  # noqa: E402
from flux2_kernels.rates import Rates  # noqa: E402

DEVICES = ROOT / "configs" / "devices.toml"
PRODUCTS = {
    torch.bfloat16: ("tflops", "efficiency"),
    torch.float16: ("tflops", "efficiency"),
    torch.int8: ("int8_tops", "int8_efficiency"),
    FP8: ("fp8_tflops", "fp8_efficiency"),
}
"""The file's names for the rate of each product's units and the share that is reached."""


def devices() -> dict[str, Rates]:
    """The rates of each device by its name in the file."""
    table = tomllib.loads(DEVICES.read_text("utf-8"))
    return {name: rates_of(row) for name, row in table.items()}


def rates_of(row: dict[str, Any]) -> Rates:
    """The rates that a device of the file reaches; without those of products that it does not give."""
    reached = {dtype: 1e12 * row[rate] * row[share] for dtype, (rate, share) in PRODUCTS.items() if rate in row}
    return Rates(row["memory_gbs"] * 1e9, reached)


def problems() -> Iterator[tuple[Op, Format, Case]]:
    """Every op at the models' shapes, activations in bf16, in each format of its rows."""
    for op in OPS.values():
        for form in op.formats:
            if form.dtype == torch.bfloat16:
                yield from ((op, form, case) for case in op.shapes)


def rows(chosen: dict[str, Rates]) -> Iterator[list[str]]:
    """One row an op, shape and format: megabytes, gigaoperations, then microseconds per device and what bounds them."""
    for op, form, case in problems():
        cost = op.cost(case.dims, form)
        times = []
        for rates in chosen.values():
            seconds = rates.seconds(cost)
            times.append("-" if seconds is None else f"{seconds * 1e6:.1f} {rates.bound(cost)[:3]}")
        yield [op.name, case.name, str(form), f"{cost.bytes / 1e6:.1f}", f"{cost.flops / 1e9:.2f}", *times]


def show(table: list[list[str]]) -> None:
    """Print with columns of one width, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        names = (cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False))
        figures = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
        print("  ".join((*names, *figures)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", action="append", help="a name in configs/devices.toml; may be given again")
    parser.add_argument("--csv", action="store_true", help="comma-separated")
    options = parser.parse_args()
    known = devices()
    unknown = [name for name in options.device or () if name not in known]
    if unknown:
        parser.error(f"no device {unknown[0]!r} in {DEVICES.name}; there are: {', '.join(known)}")
    chosen = {name: known[name] for name in options.device or known}
    table = [["op", "shape", "format", "MB", "Gop", *(f"{name} us" for name in chosen)], *rows(chosen)]
    if options.csv:
        csv.writer(sys.stdout).writerows(table)
    else:
        show(table)
        print(
            "us: roofline time in microseconds; mem: bound by device memory, mat: by matmul; "
            "-: the device lacks the format, or its rate in it is not known"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
