"""A full-size model under memory budgets, on random weights: is the budget kept, and what does it cost in seconds?

    python -m benchmarks.budgets                                  # dev, 80 to 8 GB, 1024×1024, beside diffusers' offload
    python -m benchmarks.budgets --cases aims --steps 8           # what aims are about; --cases others: the rest
    python -m benchmarks.budgets --model klein-9b --budget 12GB --budget 8GB
    python -m benchmarks.budgets --model tiny --size 512x512 --device cpu    # the same code where there is no card

Each budget and contender has a process of its own that may allocate the budget less what the CUDA context is reckoned with
(``torch.cuda.set_per_process_memory_fraction``): what needs more fails, and what takes longer than ``--limit`` does. What aims are
about comes first, and the result is written anew after every case. Ours is the whole pipeline, text encoder and autoencoder
included, as ``Flux2.load(vram=…)`` plans it, and with int8 weights by name, which at the largest budget stay on the card; where the
plan takes these by itself both are one measurement.
diffusers' is denoising alone, in 16 bit: resident, with model offload, and with groups of blocks fetched on a stream. Its text
encoder is left out, in its favour: dev's takes 48 GB in 16 bit, so that moving it as one network would fail under every budget but
the largest, and no step would be faster for it. Seconds are of a step after the first, skipped ones included, of the second picture.

"from files" is ours once more under the smallest budget, in 16 bit, from a folder of weights on the disk and with a host that is
said to have no memory for them: blocks then come from their files, through two page-locked buffers. The model is klein-4b (16 GB)
where the disk has no room for the one that is measured (112 GB for dev). What the system keeps in its page cache is its own affair.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flux2_local import Flux2, costs, load, pipeline
from flux2_local.bench import environment, peers
from flux2_local.bench.subject import Subject
from flux2_local.bench.worker import peak_resident
from flux2_local.candidates import HOST_RESERVE, SYSTEM_RESERVE
from flux2_local.errors import BackendUnavailableError, BudgetError, Flux2Error, OutputError, RequestError
from flux2_local.files import free_name
from flux2_local.hardware import Hardware, probe
from flux2_local.load import DTYPES
from flux2_local.presets import parse_bytes, show_bytes
from flux2_local.progress import Progress
from flux2_local.store import find
from scripts import random_model

from . import synthetic, tiers
from .verdicts import Verdict, tally, told

BUDGETS = ("80GB", "32GB", "24GB", "16GB", "12GB", "8GB")
OTHERWISE = "klein-4b"
INT8, FILES = "flux2-local, int8", "flux2-local, from files"
RESIDENT, CLOSE, SMALL = 80 * 10**9, 24 * 10**9, 12 * 10**9
"""Budgets that aims are about: with all weights on the card, as fast as that, and faster than diffusers."""

PREDICTED, SLOWER, FASTER = 0.15, 1.1, 2.0
"""Aims: how far a predicted step may be off, what a step may take at :data:`CLOSE` of one at :data:`RESIDENT`, and how many times
faster than diffusers' best that fits one has to be at :data:`SMALL`."""


@dataclass(frozen=True)
class Case:
    """One contender under one budget.

    Attributes:
        contender: one of :data:`CONTENDERS`.
        model: whose size, of :data:`~benchmarks.synthetic.SIZES`.
        device: torch's name of it.
        budget: bytes of device memory; 0 for no budget, where there is no card.
        width, height, steps: of the picture.
        others: bytes of the card that other processes hold, as :func:`held_by_others` finds them.
    """

    contender: str
    model: str
    device: str
    budget: int
    width: int
    height: int
    steps: int
    others: int = 0

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
        context = total - free - torch.cuda.memory_reserved(self.device) - self.others
        return torch.cuda.max_memory_reserved(self.device) + context


def ours(case: Case, folder: Path, quantize: str = "auto") -> dict[str, Any]:
    """The pipeline as it plans itself, regular tier, with weights in a format by name or in that which it chooses."""
    with synthetic.drawn():
        flux = Flux2.load(folder, device=case.device, vram=case.budget or None, quantize=quantize)
    return pictures(case, flux)


def from_files(case: Case, folder: Path) -> dict[str, Any]:
    """The same in 16 bit with weights on the disk, on a host that is said to have memory for a few blocks.

    Raises:
        OutputError: the disk has no room for any model.
    """
    name = case.model
    if name != "tiny":
        name = that_fits(name, folder)
        folder = folder if name == case.model else synthetic.folder(name, folder.with_name(name))
        random_model.write_networks(name, folder, seed=0, published=False)
    with mock.patch.object(pipeline, "hardware_to_use", lambda *_: poor(probe(case.device))):
        flux = Flux2.load(folder, device=case.device, vram=case.budget or None, quantize="none")
    return pictures(case, flux) | {"model": name}


def that_fits(name: str, folder: Path) -> str:
    """``name``, or klein-4b where the disk has no room for that."""
    try:
        random_model.check_room(folder, random_model.total(name, published=False))
        return name
    except OutputError:
        random_model.check_room(folder, random_model.total(OTHERWISE, published=False))
        return OTHERWISE


def poor(hardware: Hardware) -> Hardware:
    """The same with memory for a few blocks on its host."""
    return replace(hardware, ram=HOST_RESERVE + 4 * 2**30)


def pictures(case: Case, flux: Flux2) -> dict[str, Any]:
    """Two pictures, and the figures of the second."""
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
    plan, timings = result.plan, result.timings.to_dict()
    assert plan is not None, "this process made the pictures"
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
        "mapped": list(plan.transformer.mapped),
        "notes": list(result.notes),
    }


def stock(case: Case, folder: Path, change: peers.Change) -> dict[str, Any]:
    """diffusers' denoising; ``change`` puts the pipeline where it is to be.

    Raises:
        BudgetError: the transformer is to be on the card as a whole, and alone is more than the budget.
    """
    hardware = probe(case.device)
    size = costs.parameters(load.architecture(find(folder, "standard")))["transformer"]
    size *= DTYPES[hardware.fast_dtypes[0]].itemsize
    if case.budget and change is not grouped and size > case.budget:
        raise BudgetError(f"its transformer's weights are {show_bytes(size)}", size)
    bench = tiers.prepare(folder, hardware, case.width, case.height, case.steps, torch.device("cpu"))
    case.limit()

    def place(pipe: Any, subject: Subject) -> None:
        bench.state.clear()  # the pipeline's alone now: what is moved must not stay on the host, too
        change(pipe, subject)

    contender = bench.stock(place)
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
    INT8: partial(ours, quantize="builtin-int8"),
    FILES: from_files,
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


def held_by_others(hardware: Hardware) -> int:
    """Bytes of the card that are taken while this process has nothing there but its context, which is another one to a case's."""
    if hardware.kind != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(hardware.device)
    return total - free


def measured(case: Case, limit: float) -> dict[str, Any]:
    """The row of a case, from a process of its own that may take ``limit`` seconds."""
    command = [sys.executable, "-m", "benchmarks.budgets", "--case", json.dumps(asdict(case))]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        found = {"error": f"it was not done after {limit:g} seconds"}
    else:
        last = ran.stdout.strip().rpartition("\n")[2]
        if ran.returncode or not last.startswith("{"):
            found = {"error": f"its process ended with {ran.returncode}: {ran.stderr.strip()[-400:]}"}
        else:
            found = json.loads(last)
    return {"contender": case.contender, "budget": case.budget} | found


def known(contender: str, budget: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of int8 by name where the plan took int8 by itself under the same budget: both are one plan."""
    for row in rows if contender == INT8 else ():
        own = row["contender"] == "flux2-local" and row["budget"] == budget
        if own and row.get("plan", {}).get("weights") == "builtin-int8":
            return row | {"contender": INT8, "measured_as": "flux2-local"}
    return None


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    what = f"{row['contender']}, {show_bytes(row['budget']) if row['budget'] else 'no budget'}"
    if "error" in row:
        return f"{what}: {row['error']}"
    kept = "" if not row["budget"] else "kept" if row["peak"] <= row["budget"] else "EXCEEDED"
    beside = f", predicted {row['predicted_seconds']['step']:.3f} s" if "predicted_seconds" in row else ""
    return f"{what}: {row['seconds']['step']:.3f} s a step{beside}; peak {show_bytes(row['peak'])} {kept}".rstrip()


def aims(rows: Sequence[dict[str, Any]]) -> Iterator[Verdict]:
    """Whether predictions and budgets reach what they are to."""
    found = {(row["contender"], row["budget"]): row for row in rows if "error" not in row}

    def step(contender: str, budget: int) -> float | None:
        row = found.get((contender, budget))
        return None if row is None else row["seconds"]["step"]

    for (contender, budget), row in found.items():
        if "predicted_seconds" in row and contender != FILES:  # the disk's rate is the system's page cache's
            far = abs(row["predicted_seconds"]["step"] / row["seconds"]["step"] - 1)
            yield f"{contender}, {show_bytes(budget)}", f"predicted within {PREDICTED:.0%}", far <= PREDICTED
    theirs = {row["contender"]: row for row in rows if row["contender"] in THEIRS and row["budget"] == SMALL}
    others = [row["seconds"]["step"] for row in theirs.values() if "error" not in row]
    no_room = all(row.get("error", "").startswith(NO_ROOM) for row in theirs.values())
    tried = len(theirs) == len(THEIRS) and (bool(others) or no_room)
    whole = step(INT8, RESIDENT)
    for contender in ("flux2-local", INT8):
        close, small = step(contender, CLOSE), step(contender, SMALL)
        met = None if close is None or whole is None else close <= SLOWER * whole
        yield contender, f"at {show_bytes(CLOSE)} within {SLOWER} times int8 fully resident", met
        fit = "diffusers, of which nothing fits" if tried and not others else "diffusers' best that fits"
        met = None if small is None or not tried else not others or min(others) >= FASTER * small
        yield contender, f"at {show_bytes(SMALL)} {FASTER:g} times as fast as {fit}", met


THEIRS = [name for name in CONTENDERS if name.startswith("diffusers")]
NO_ROOM = ("OutOfMemoryError", "BudgetError")
"""Errors of what does not fit; any other says nothing about that."""


def cases(budgets: Sequence[int], contenders: Sequence[str], which: str = "all") -> list[tuple[int, str]]:
    """What is measured: every contender under every budget, from files only under the smallest; what aims are about comes first.

    Args:
        which: "all", "aims" (what these are about) or "others".
    """
    found = [(b, c) for b, c in itertools.product(budgets, contenders) if c != FILES or b == min(budgets)]
    first, others = [case for case in found if aimed(*case)], [case for case in found if not aimed(*case)]
    return {"all": first + others, "aims": first, "others": others}[which]


def aimed(budget: int, contender: str) -> bool:
    """Whether an aim rests on it."""
    held = {RESIDENT: [INT8], CLOSE: ["flux2-local", INT8], SMALL: ["flux2-local", INT8, *THEIRS]}
    return contender in held.get(budget, ())


def asked(texts: Sequence[str] | None, hardware: Hardware) -> list[int]:
    """The budgets that are named, or those of :data:`BUDGETS` that the card has; 0 where there is no card.

    Raises:
        RequestError: one that is named is more than the card has.
        BackendUnavailableError: the card has less than the smallest.
    """
    if hardware.kind != "cuda":
        return [0]
    wanted, memory = [parse_bytes(text) for text in texts or BUDGETS], show_bytes(hardware.memory)
    large = [budget for budget in wanted if budget > hardware.memory]
    if texts and large:
        raise RequestError(f"{hardware.name} has {memory}, less than {show_bytes(large[0])}. Name less with --budget.")
    if wanted == large:
        raise BackendUnavailableError(f"{hardware.name} has {memory}. Name budgets below that with --budget.")
    if large:
        print(f"left out, since {hardware.name} has {memory}: {', '.join(map(show_bytes, large))}")
    return [budget for budget in wanted if budget not in large]


def main() -> None:
    parser = tiers.options("budgets", __doc__)
    parser.add_argument("--budget", action="append", help=f"device memory; may be given again ({', '.join(BUDGETS)})")
    parser.add_argument("--contender", action="append", choices=CONTENDERS, help="may be given again (default: all)")
    parser.add_argument(
        "--cases",
        choices=("all", "aims", "others"),
        default="all",
        help="of these, only those that an aim rests on, or the others",
    )
    parser.add_argument("--limit", type=float, default=1800, metavar="SECONDS", help="for each case (default 1800)")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(work(Case(**json.loads(args.case)))))
        return
    hardware, (width, height) = probe(args.device), args.size
    budgets = asked(args.budget, hardware)
    record = environment.record(hardware.device)
    record |= {"model": args.model, "size": [width, height], "steps": args.steps, "rows": []}
    path = args.out or free_name(environment.place(record, "budgets"))
    todo = cases(budgets, args.contender or list(CONTENDERS), args.cases)
    if not todo:
        print("no such case under these budgets")
        return
    for budget, contender in todo:
        case = Case(contender, args.model, hardware.device, budget, width, height, args.steps, held_by_others(hardware))
        record["rows"].append(known(contender, budget, record["rows"]) or measured(case, args.limit))
        print(line(record["rows"][-1]), flush=True)
        if hardware.kind == "cuda" and args.model == "dev":
            record["aims"] = tally(aims(record["rows"]))
        environment.keep(record, "budgets", path)
    if "aims" in record:
        print(told(record["aims"]))
    print(f"written: {path}")


if __name__ == "__main__":
    try:
        main()
    except Flux2Error as error:
        raise SystemExit(f"{error}") from None
