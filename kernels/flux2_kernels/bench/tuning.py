"""The choice of launch configurations and of implementations on a card, by measuring them; what ``tuned/`` keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from ..constraint import FP8, Format, Place, name_of
from ..op import Case, Op
from ..registry import OPS, choose, reasons
from ..tables import Config, config_of, imposed
from ..verify import draw
from .checks import check_one
from .timing import measure, sets_for

BF16 = Format(torch.bfloat16)
INT8 = Format(torch.bfloat16, torch.int8)
E4M3 = Format(torch.bfloat16, FP8)
FEW_ROWS = 512  # the text tokens of a double block
SIZES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
TILES = (
    (64, 128, 128, 4, 3),
    (64, 128, 128, 4, 4),
    (64, 256, 128, 8, 3),
    (128, 64, 128, 4, 4),
    (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 3),
    (128, 128, 128, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 256, 128, 8, 3),
    (128, 256, 128, 8, 4),
    (256, 128, 64, 8, 3),
)
PACKED_SIZES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
PACKED_TILES = (
    (32, 128, 4, 3),
    (64, 64, 4, 3),
    (64, 128, 8, 3),
    (64, 128, 8, 2),
    (128, 64, 8, 3),
    (128, 128, 8, 2),
    (128, 128, 8, 3),
)

Problem = tuple[str, Format, Case]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Group:
    """Problems that share an entry of the table, and the condition under which it is taken."""

    condition: dict[str, Any]
    problems: tuple[Problem, ...]


def candidates(kernel: str, sm: int) -> list[Config]:
    """What may be chosen for ``kernel``."""
    if kernel.startswith("linear_w8a8"):
        ways: list[dict[str, Any]] = [{}, {"descriptors": True}] if sm >= 90 else [{}]
        return [{**dict(zip(SIZES, tile, strict=True)), "GROUP": 8, **way} for tile in TILES for way in ways]
    if kernel.startswith("linear_w4"):
        return [{**dict(zip(PACKED_SIZES, tile, strict=True)), "GROUP": 8} for tile in PACKED_TILES]
    if kernel == "scale":
        return [{"BLOCK_M": m, "BLOCK_N": n, "num_warps": w} for m in (8, 16, 32) for n in (128, 256) for w in (4, 8)]
    if kernel == "qk_norm_rope":
        return [{"HEADS": h, "num_warps": w} for h in (8, 16, 32) for w in (2, 4, 8)]
    if kernel == "quantize_rotated":
        return [{"BLOCK": b, "num_warps": w} for b in (2048, 4096) for w in (4, 8)]
    if kernel in ("gated_residual", "swiglu", "swiglu_quantized"):
        return [{"BLOCK": b, "num_warps": w} for b in (1024, 2048, 4096, 8192) for w in (4, 8, 16)]
    return [{"num_warps": w} for w in (2, 4, 8, 16, 32)]


def groups(kernel: str) -> list[Group]:
    """The entries that ``kernel`` gets, narrowest condition first; the last has none."""
    if kernel in ("modulated_norm", "gated_residual_norm"):
        return _by_width((kernel, f"{kernel}_quantized"), 16384)
    if kernel == "quantize_rows":
        return _by_width((kernel,), 24576)
    if kernel == "quantize_rotated":
        rotated = tuple(p for p in _shapes(("quantize_rows",), INT8) if p[2].dims.get("hadamard"))
        return [Group({}, rotated)]
    if kernel.startswith("linear_w8a8"):
        form = E4M3 if kernel.endswith("fp8") else INT8
        names = ("linear_w8a8", "linear_w8a8_gated")
        few = tuple(
            (name, form, Case(case.name, {**case.dims, "tokens": FEW_ROWS})) for name, _, case in _shapes(names, form)
        )
        return [Group({"at_most": {"rows": FEW_ROWS}}, few), Group({}, _shapes(names, form))]
    if kernel == "scale":
        return [Group({}, _shapes(("linear_w8a8", "linear_w8a8_gated"), INT8))]
    form = INT8 if kernel in ("swiglu_quantized", "linear_w4a8") else BF16
    return [Group({}, _shapes((kernel,), form))]


def ops_of(kernel: str) -> set[str]:
    """The ops that ``kernel`` is chosen by."""
    return {name for group in groups(kernel) for name, _, _ in group.problems}


def _shapes(names: Sequence[str], form: Format) -> tuple[Problem, ...]:
    return tuple((name, form, case) for name in names for case in OPS[name].shapes)


def _by_width(names: Sequence[str], widest: int) -> list[Group]:
    def problems(width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Problem, ...]:
        case = Case(f"width-{width}", {**OPS[names[0]].shapes[0].dims, "width": width})
        quantized = (INT8.quantized if INT8 in OPS[name].formats else None for name in names)
        return tuple((name, Format(dtype, kind), case) for name, kind in zip(names, quantized, strict=True))

    float32 = Group({"equal": {"size": 4}}, problems(widest, torch.float32))  # twice the registers: it must not spill
    conditions: list[dict[str, Any]] = [{"at_most": {"width": 4096}}, {"at_most": {"width": 8192}}, {}]
    widths = zip(conditions, (3072, 6144, widest), strict=True)
    return [float32, *(Group(given, problems(width)) for given, width in widths)]


@contextmanager
def recorded() -> Iterator[list[Any]]:
    """The launches made inside."""
    from ..gpu.launch import Launch

    seen: list[Any] = []
    run = Launch.run

    def kept(self: Launch) -> None:
        seen.append(self)
        run(self)

    with mock.patch.object(Launch, "run", kept):
        yield seen


@dataclass(frozen=True)
class Tuner:
    """Measures on one device.

    Attributes:
        place, device: where.
        cut: makes a problem's case smaller, for a dry run, or leaves it.
        most: candidates tried per kernel, and problems that they are tried on; None for all.
        progress: told each choice, a line.
    """

    place: Place
    device: torch.device
    cut: Callable[[Op, Case], Case]
    most: int | None = None
    progress: Progress = print

    def tables(
        self, kept: dict[str, Any], card: str, kernels: Sequence[str], names: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        """``kept`` with the entries of ``kernels`` and then the order of implementations of those linears that are among ``names``,
        one after another replaced by what is found."""
        configs, order = dict(kept["configs"]), dict(kept["order"])
        table = {"sm": self.place.sm, "measured_on": card, "configs": configs, "order": order}
        for kernel in kernels:
            configs[kernel] = [self.entry(kernel, group) for group in groups(kernel)]
            yield table
        for name in ("linear_w8a8", "linear_w8a8_gated"):
            if name in names:
                order[name] = {**order.get(name, {}), **self.order(name)}
                yield table

    def entry(self, kernel: str, group: Group) -> Config:
        """The quickest configuration that is right and spills no registers; the kept one if none is."""
        timed = []
        for config in candidates(kernel, self.place.sm)[: self.most]:
            with imposed(kernel, config):
                try:
                    timed.append((self.seconds(group.problems, self.implementation(kernel)), config))
                except Exception as error:  # a configuration may ask for more than the card has
                    self.progress(f"{kernel} {config}: {type(error).__name__}")
        for milliseconds, config in sorted(timed, key=lambda pair: pair[0]):
            if self.sound(kernel, config, group):
                self.progress(f"{kernel} {group.condition}: {config}, {milliseconds:.3f} ms")
                return {**group.condition, **config}
        dims = {**group.problems[0][2].dims, **group.condition.get("at_most", {}), **group.condition.get("equal", {})}
        return {**group.condition, **config_of(self.place.sm, kernel, **dims)}

    def implementation(self, kernel: str) -> str:
        """Of the kernel's ops, the implementation that launches it."""
        return "int_mm" if kernel == "scale" else "triton"

    def seconds(self, problems: Sequence[Problem], implementation: str) -> float:
        """Milliseconds of all problems, one after the other."""
        return sum(self.time(problem, implementation) for problem in problems[: self.most])

    def time(self, problem: Problem, implementation: str) -> float:
        """Milliseconds of one problem."""
        name, form, case = problem
        op = OPS[name]
        case = self.cut(op, case)
        function = choose(name, self.place, form, case.dims, implementation).function
        sets = sets_for(lambda seed: draw(op, case, form, self.device, seed), op.cost(case.dims, form).bytes)
        return measure(function, sets, replays=10).p50

    def sound(self, kernel: str, config: Config, group: Group) -> bool:
        """Whether results are right with ``config`` and its binaries spill nothing."""
        from ..gpu.launch import INTERPRETED

        with imposed(kernel, config), recorded() as launches:
            for name, form, case in group.problems[: self.most]:
                op = OPS[name]
                few = self.cut(op, Case(case.name, {**case.dims, "tokens": 40}))
                if not check_one(op, few, form, self.implementation(kernel), self.device).passed:
                    return False
        if INTERPRETED:
            return True
        from ..gpu.aot import compile_for

        return all(not compile_for(launch, self.place.sm).spills for launch in launches)

    def order(self, name: str) -> dict[str, list[str]]:
        """Implementations of a linear by its time over the models' shapes, quickest first, per format of its rows."""
        result = {}
        for form in (INT8, E4M3):
            problems = _shapes((name,), form)
            dims = self.cut(OPS[name], problems[0][2]).dims
            usable = [i for i, why in reasons(name, self.place, form, dims).items() if why is None and i != "reference"]
            times = {}
            for i in usable:
                try:
                    times[i] = self.seconds(problems, i)
                except Exception as error:  # a library may refuse what its constraint allows
                    self.progress(f"{name} {form} {i}: {type(error).__name__}")
            if times:
                result[name_of(form.quantized)] = sorted(times, key=times.__getitem__)
                self.progress(f"{name} {form}: " + ", ".join(f"{i} {t:.3f} ms" for i, t in times.items()))
        return result


def written(table: dict[str, Any]) -> str:
    """The table as the files of ``tuned/`` hold it: an entry a line."""
    lines = ["{", f'  "sm": {table["sm"]},', f'  "measured_on": {json.dumps(table["measured_on"])},', '  "configs": {']
    kernels = []
    for kernel, entries in table["configs"].items():
        inside = ",\n".join(f"      {json.dumps(entry)}" for entry in entries)
        kernels.append(f'    "{kernel}": [\n{inside}\n    ]')
    lines += [",\n".join(kernels), "  },", '  "order": {']
    lines.append(",\n".join(f'    "{name}": {json.dumps(order)}' for name, order in table["order"].items()))
    return "\n".join([*lines, "  }", "}"]) + "\n"
