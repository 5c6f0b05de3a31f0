"""A full-size model under memory budgets, on random weights: is the budget kept, and what does it cost in seconds?

    python -m benchmarks.budgets                                  # dev, 80 to 8 GB, 1024×1024, beside diffusers' offload
    python -m benchmarks.budgets --model klein-9b --budget 12GB --budget 8GB
    python -m benchmarks.budgets --model tiny --size 512x512 --device cpu    # the same code where there is no card

Each budget and contender has a process of its own that may allocate the budget less what the CUDA context is reckoned with
(``torch.cuda.set_per_process_memory_fraction``): what needs more fails. Ours is the whole pipeline, text encoder and autoencoder
included, as ``Flux2.load(vram=…)`` plans it; diffusers' is denoising alone, in 16 bit, resident and with groups of blocks fetched on
a stream. Seconds are of a step after the first, skipped ones included, of the second picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flux2_local import Flux2
from flux2_local.bench import environment, peers
from flux2_local.bench.subject import Subject
from flux2_local.bench.worker import peak_resident
from flux2_local.candidates import SYSTEM_RESERVE
from flux2_local.errors import Flux2Error
from flux2_local.hardware import probe
from flux2_local.presets import parse_bytes, show_bytes
from flux2_local.progress import Progress

from . import synthetic, tiers

BUDGETS = ("80GB", "32GB", "24GB", "16GB", "12GB", "8GB")


@dataclass(frozen=True)
class Case:
    """One contender under one budget.

    Attributes:
        contender: one of :data:`CONTENDERS`.
        model: whose size, of :data:`~benchmarks.synthetic.SIZES`.
        device: torch's name of it.
        budget: bytes of device memory; 0 for no budget, where there is no card.
        width, height, steps: of the picture.
    """

    contender: str
    model: str
    device: str
    budget: int
    width: int
    height: int
    steps: int

    @property
    def card(self) -> bool:
        return self.device.startswith("cuda")

    def limit(self) -> None:
        """From here on allocate no more than the budget, the context left out."""
        if self.card and self.budget:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction((self.budget - SYSTEM_RESERVE["cuda"]) / total, self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Peak bytes since: reserved on the card, with the context; resident in host memory where there is no card."""
        if not self.card:
            return peak_resident(os.getpid())
        free, total = torch.cuda.mem_get_info(self.device)
        context = total - free - torch.cuda.memory_reserved(self.device)
        return torch.cuda.max_memory_reserved(self.device) + context


def ours(case: Case, folder: Path) -> dict[str, Any]:
    """The pipeline as it plans itself, regular tier."""
    with synthetic.drawn():
        flux = Flux2.load(folder, device=case.device, vram=case.budget or None)
    case.limit()
    ends: list[float] = []

    def watch(report: Progress) -> None:
        if report.stage == "denoise" and report.step:
            ends.append(time.perf_counter())

    for seed in (0, 1):
        ends.clear()
        result = flux.generate(
            "a lighthouse at dusk",
            seed=seed,
            image_size={"width": case.width, "height": case.height},
            num_inference_steps=case.steps,
            enable_safety_checker=False,
            progress=watch,
        )
    plan, timings = flux.plan, result.timings.to_dict()
    predicted = {"step": plan.step_seconds, "encode": plan.encode_seconds, "decode": plan.decode_seconds}
    return {
        "seconds": {
            "step": (ends[-1] - ends[0]) / (len(ends) - 1),
            "encode": timings["encode"],
            "decode": timings["decode"],
        },
        "predicted_seconds": predicted,
        "predicted_peak": plan.peak_bytes,
        "plan": {choice.what: choice.value for choice in plan.choices},
        "notes": list(result.notes),
    }


def stock(case: Case, folder: Path, change: peers.Change) -> dict[str, Any]:
    """diffusers' denoising; ``change`` puts the pipeline where it is to be."""
    hardware = probe(case.device)
    bench = tiers.prepare(folder, hardware, case.width, case.height, case.steps, torch.device("cpu"))
    case.limit()
    contender = bench.stock(change)
    ends: list[float] = []
    for _ in range(2):
        ends.clear()
        contender.run(lambda: ends.append(time.perf_counter()))
    return {"seconds": {"step": (ends[-1] - ends[0]) / (len(ends) - 1)}}


def grouped(pipe: Any, subject: Subject) -> None:
    """Groups of one block, the next fetched while one computes. All weights are page-locked once where the host has room for a copy,
    else block by block. Without a card there is no stream to fetch on."""
    size, device = sum(weight.nbytes for weight in pipe.transformer.parameters()), torch.device(subject.device)
    pipe.vae.to(device)
    pipe.transformer.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
        low_cpu_mem_usage=device.type == "cuda" and 1.2 * size > probe("cpu").free,
    )


def offloaded(pipe: Any, subject: Subject) -> None:
    """One network at a time on the card; without a card there is nothing to move."""
    (peers.model_offload if subject.kind == "cuda" else peers.plain)(pipe, subject)


CONTENDERS: dict[str, Callable[[Case, Path], dict[str, Any]]] = {
    "flux2-local": ours,
    "diffusers, resident": lambda case, folder: stock(case, folder, peers.plain),
    "diffusers, model offload": lambda case, folder: stock(case, folder, offloaded),
    "diffusers, group offload": lambda case, folder: stock(case, folder, grouped),
}


def work(case: Case) -> dict[str, Any]:
    """What a case's own process finds; with ``error`` where it does not fit."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = synthetic.folder(case.model, Path(scratch) / case.model)
            return CONTENDERS[case.contender](case, folder) | {
                "peak": case.peak(),
                "host_peak": peak_resident(os.getpid()),
            }
    except (Flux2Error, torch.OutOfMemoryError) as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}


def measured(case: Case) -> dict[str, Any]:
    """The row of a case, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.budgets", "--case", json.dumps(asdict(case))]
    ran = subprocess.run(command, capture_output=True, text=True)
    last = ran.stdout.strip().rpartition("\n")[2]
    if ran.returncode or not last.startswith("{"):
        found = {"error": f"its process ended with {ran.returncode}: {ran.stderr.strip()[-400:]}"}
    else:
        found = json.loads(last)
    return {"contender": case.contender, "budget": case.budget} | found


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    what = f"{row['contender']}, {show_bytes(row['budget']) if row['budget'] else 'no budget'}"
    if "error" in row:
        return f"{what}: {row['error']}"
    kept = "" if not row["budget"] else "kept" if row["peak"] <= row["budget"] else "EXCEEDED"
    beside = f", predicted {row['predicted_seconds']['step']:.3f} s" if "predicted_seconds" in row else ""
    return f"{what}: {row['seconds']['step']:.3f} s a step{beside}; peak {show_bytes(row['peak'])} {kept}".rstrip()


def main() -> None:
    parser = tiers.options("budgets", __doc__)
    parser.add_argument("--budget", action="append", help=f"device memory; may be given again ({', '.join(BUDGETS)})")
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="may be given again (default: all)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(work(Case(**json.loads(args.case)))))
        return
    hardware, (width, height) = probe(args.device), args.size
    budgets: Sequence[int] = [parse_bytes(text) for text in args.budget or BUDGETS] if hardware.kind == "cuda" else [0]
    record = environment.record(hardware.device)
    record |= {"model": args.model, "size": [width, height], "steps": args.steps, "rows": []}
    for budget, contender in itertools.product(budgets, args.contender or CONTENDERS):
        case = Case(contender, args.model, hardware.device, budget, width, height, args.steps)
        record["rows"].append(measured(case))
        print(line(record["rows"][-1]), flush=True)
        path = environment.keep(record, "budgets", args.out)
    print(f"written: {path}")


if __name__ == "__main__":
    try:
        main()
    except Flux2Error as error:
        raise SystemExit(f"{error}") from None
