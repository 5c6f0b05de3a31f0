"""Everything that only an NVIDIA card can tell: kernels, then FLUX.2 at full size: tiers, memory budgets, how steps scale.

    make gpu                                  # or: python scripts/gpu.py
    python scripts/gpu.py --part kernels      # one part; may be given again
    python scripts/gpu.py --op linear_w8a8    # the kernels' part for one op; may be given again
    python scripts/gpu.py --tune              # choose configurations first and keep them in tuned/sm_XX.json
    python scripts/gpu.py --dry-run           # the same code on a CPU: tiny shapes, Triton's interpreter, meaningless times

First correctness: every op, implementation and format against float64; each op's kernel in its first format in a CUDA graph
and under torch.compile; five ops once under compute-sanitizer where it is installed. Then the card's own rates (copy, matmuls),
and each op at dev's and klein's shapes: our time beside torch op by op, inductor and the best library, all as replays of CUDA
graphs, and beside them how long a call keeps the host. Results go to benchmarks/results/, row by row, as a CSV and a JSON
record of the environment; the last line printed is that record. Tiers (benchmarks/tiers.py) and budgets
(benchmarks/budgets.py) beside diffusers follow, of the largest model that the card holds twice, dev on one of 141 GB, and steps
of every one that it holds (benchmarks/scaling.py), on random weights that are drawn on the card. A part for which the card is
too small is left out, and that is said. Exits with 1 if a check, a row or a part failed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from flux2_kernels import Case, Op, Place
    from flux2_kernels.bench.checks import Check
    from flux2_kernels.bench.report import Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("kernels", "tiers", "budgets", "scaling")
SMALL = ("--model", "tiny", "--device", "cpu", "--size", "512x512", "--steps", "4")
QUICK = {
    "tiers": (*SMALL, "--only", "none", "--only", "high, int8"),
    "budgets": (*SMALL, "--contender", "flux2-local", "--contender", "diffusers, group offload"),
    "scaling": ("--device", "cpu", "--rounds", "1"),
}
"""Options of the models' parts in a dry run."""

SANITIZED = ("modulated_norm_quantized", "gated_residual_norm", "qk_norm_rope", "swiglu_quantized", "linear_w8a8_gated")
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


@dataclass(frozen=True)
class Run:
    """What was asked for, and where it runs."""

    ops: tuple[Op, ...]
    place: Place
    device: torch.device
    folder: Path
    dry: bool
    tune: bool
    check_only: bool

    def cases(self, op: Op) -> tuple[Case, ...]:
        """The models' shapes; two of the tests' in a dry run."""
        return op.cases[1:3] if self.dry else op.shapes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", help="only this op; may be given again")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    parser.add_argument("--tune", action="store_true", help="choose and keep launch configurations before measuring")
    parser.add_argument("--check-only", action="store_true", help="correctness at small sizes and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, interpreted, tiny")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (benchmarks/results; a temporary one in a dry run)"
    )
    return parser.parse_args()


def obstacle() -> str | None:
    """Why nothing can be measured here, and what to do; None if it can."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip:
        found = f"torch {torch.__version__} sees no NVIDIA card"
        return f"{found}. Install a CUDA build of torch and a driver (nvidia-smi must list the card), or use --dry-run."
    if torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        return f"{name} has a compute capability below 8.0, which the kernels need (Ampere or newer)."
    return None


def prepare(options: argparse.Namespace) -> Run:
    """Resolve the options; in a dry run Triton is told to interpret before it is imported."""
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("Triton is not installed, and the kernels are written in it: pip install triton")
    if not options.dry_run and (reason := obstacle()):
        raise SystemExit(reason)
    import torch
    from flux2_kernels import OPS, place_of

    if unknown := [name for name in options.op or () if name not in OPS]:
        raise SystemExit(f"no op {unknown[0]!r}; there are: {', '.join(OPS)}")
    if options.dry_run:
        from flux2_kernels.gpu.interpreter import act_like_hardware

        act_like_hardware()
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    folder = options.out or (Path(tempfile.mkdtemp(prefix="flux2-kernels-")) if options.dry_run else RESULTS)
    ops = tuple(OPS[name] for name in options.op or OPS)
    return Run(ops, place_of(device), device, folder, options.dry_run, options.tune, options.check_only)


def check(run: Run) -> list[Check]:
    """Every check; prints a line an op and each failure."""
    from flux2_kernels.bench.checks import check_all, check_compiled, check_graph

    done: list[Check] = []
    for op in run.ops:
        here = list(check_all(op, op.cases[:1] if run.dry else op.cases, run.place, run.device))
        form = op.formats[0]
        if not run.check_only:
            here.append(check_compiled(op, form, run.place, run.device, "aot_eager" if run.dry else "inductor"))
            if not run.dry:
                here.append(check_graph(op, form, run.place, run.device))
        worst = max(one.share for one in here)
        print(
            f"{op.name}: {sum(one.passed for one in here)} of {len(here)} checks passed, largest error {worst:.2f} of its bound"
        )
        for one in here:
            if not one.passed:
                print(f"  FAILED {one.case} {one.form} {one.implementation}: {one.fault}")
        done += here
    return done


def sanitize(run: Run) -> str:
    """The small checks of a few ops under compute-sanitizer: "clean" or its findings with their names, or why it did not run."""
    tool = shutil.which("compute-sanitizer")
    if run.dry or tool is None:
        return "not run: " + (
            "dry run" if run.dry else "compute-sanitizer is not installed (it comes with the CUDA toolkit)"
        )
    names = [op.name for op in run.ops if op.name in SANITIZED] or [run.ops[0].name]
    command = [tool, "--error-exitcode", "3", sys.executable, str(Path(__file__)), "--check-only"]
    command += [part for name in names for part in ("--op", name)]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    if ran.returncode == 0:
        return f"clean: {', '.join(names)}"
    return f"failed with {ran.returncode} in {', '.join(names)}: {(ran.stdout + ran.stderr)[-2000:]}"


def tune(run: Run) -> Path:
    """Measure candidates, write the SM's table, and use it from here on."""
    from flux2_kernels import tables
    from flux2_kernels.bench.tuning import Tuner, written

    sm = run.place.sm or 89
    kernels = [k for k in tables.table(sm)["configs"] if not run.dry or k in ("modulated_norm", "linear_w4a8", "scale")]
    place = run.place if run.place.sm else type(run.place)("cpu", sm, triton=True, interpreter=True)
    cut = (lambda op, case: op.cases[1]) if run.dry else (lambda op, case: case)
    tuner = Tuner(place, run.device, cut, most=2 if run.dry else None)
    path = (run.folder if run.dry else tables.FOLDER) / f"sm_{sm}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written(tuner.table(card(run), kernels)))
    tables.forget()
    return path


def card(run: Run) -> str:
    import torch

    return "dry run" if run.dry else torch.cuda.get_device_name(run.device)


def measured(run: Run, record: dict[str, Any]) -> Iterator[Row]:
    """The card's rates, into the record; then a row a problem, printed as they come."""
    from flux2_kernels.bench.report import Bench, rates_record
    from flux2_kernels.bench.timing import measured_rates

    rates = measured_rates(run.device, run.place.sm, 64 if run.dry else 8192)
    record["rates"] = rates_record(rates)
    print("measured: " + ", ".join(f"{name} {value:.4g}" for name, value in record["rates"].items()))
    bench = Bench(run.place, run.device, rates, "aot_eager" if run.dry else "inductor")
    for op in run.ops:
        for row in bench.rows(op, run.cases(op)):
            print(line(row), flush=True)
            yield row


def line(row: Row) -> str:
    what = f"{row.op} {row.shape} {row.format}"
    if row.ours_ms is None:
        return f"{what:62s} FAILED {row.problem}"
    rivals = (
        ("eager", row.eager_ms),
        ("inductor", row.inductor_ms),
        (row.library, row.library_ms),
        ("bf16", row.cublas_bf16_ms),
    )
    beside = ", ".join(f"{name} {ms:.3f}" for name, ms in rivals if ms is not None)
    speed = f"{row.tflop_per_s:.1f} TFLOP/s" if row.tflop_per_s is not None else f"{row.gb_per_s:.0f} GB/s"
    share = "" if row.percent_of_measured is None else f" ({row.percent_of_measured:.0f}%)"
    failed = f" FAILED {row.problem}" if row.problem else ""
    host = f"{row.host_us:.0f} us of the host"
    return f"{what:62s} {row.ours_ms:.3f} ms, {host}, {speed}{share}, error {row.error:.2f}{failed}; {beside}"


def aims(rows: Sequence[Row]) -> dict[str, Any]:
    """How many rows reach each aim, and which do not."""
    from benchmarks.verdicts import tally

    return tally((f"{row.op} {row.shape} {row.format}", aim, met) for row in rows for aim, met in row.aims())


def card_record(run: Run) -> Iterator[tuple[str, Any]]:
    """The card, its driver and its clocks."""
    import torch

    from flux2_local.bench.environment import said

    yield "device", card(run)
    yield "sm", run.place.sm
    yield "cuda", torch.version.cuda
    if not run.dry:
        properties = torch.cuda.get_device_properties(run.device)
        yield "memory_gb", round(properties.total_memory / 1e9, 1)
        yield "processors", properties.multi_processor_count
        query = "driver_version,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"
        yield query, said("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def write(run: Run, rows: Sequence[Row], record: dict[str, Any]) -> Path:
    """The CSV and, beside it, the record, each whole or as it was before; returns the CSV's path."""
    from flux2_kernels.bench.report import COLUMNS, values

    from flux2_local import files

    name = "-".join(["kernels", *record["device"].lower().split(), record["date"][:19].replace(":", "")])
    path = run.folder / f"{name}.csv"
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    writer.writerows(map(values, rows))
    files.write(path.with_suffix(".json"), (json.dumps(record, indent=2) + "\n").encode())
    return files.write(path, table.getvalue().encode())


def kernels(run: Run) -> bool:
    """The kernels' part; whether all is well."""
    from flux2_local.bench.environment import software

    checks = check(run)
    failed = [one for one in checks if not one.passed]
    if run.check_only:
        return not failed
    record: dict[str, Any] = dict(software()) | dict(card_record(run))
    record["checks"] = len(checks)
    record["failed"] = [f"{c.op} {c.case} {c.form} {c.implementation}: {c.fault}" for c in failed]
    record["sanitizer"] = sanitize(run)
    rows: list[Row] = []
    path = write(run, rows, record)
    if run.tune:
        record["tuned"] = tune(run).name
    for row in measured(run, record):
        rows.append(row)
        if row.problem:
            record["failed"].append(f"{row.op} {row.shape} {row.format} {row.implementation}: {row.problem}")
        record["aims"] = aims(rows)
        write(run, rows, record)
    print(f"written: {path} and {path.with_suffix('.json').name}")
    print(json.dumps(record))
    return not record["failed"] and not record["sanitizer"].startswith("failed")


def extent(run: Run, part: str) -> tuple[str, ...]:
    """The options of a part on whole models: of how large a model it is.

    Raises:
        BackendUnavailableError: the card holds none.
    """
    if run.dry:
        return QUICK[part]
    if part == "scaling":  # it takes every one that fits
        return "--device", str(run.device)
    import torch

    from benchmarks.tiers import largest
    from flux2_local.hardware import probe

    torch.cuda.empty_cache()  # of the kernels' part
    return "--device", str(run.device), "--model", largest(probe(str(run.device)))


def models(run: Run, part: str) -> bool:
    """One of the parts on whole models, in a process of its own, which leaves the card empty; whether all is well."""
    from flux2_local.errors import BackendUnavailableError

    try:
        options = extent(run, part)
    except BackendUnavailableError as error:
        print(f"{part} left out: {error}", flush=True)
        return True
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{part}",
        "--out",
        str(run.folder / f"{part}-{time.strftime('%Y-%m-%d')}.json"),
    ]
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    return subprocess.run([*command, *options], cwd=ROOT, env=environment).returncode == 0


def well(run: Run, part: str) -> bool:
    """Whether all is well with one part; an exception is printed, and takes no other part along."""
    try:
        return kernels(run) if part == "kernels" else models(run, part)
    except Exception:
        traceback.print_exc()
        return False


def main() -> int:
    options = parse()
    run = prepare(options)
    wanted = options.part or (["kernels"] if options.op or options.check_only else PARTS)
    fine = [well(run, part) for part in PARTS if part in wanted]
    return int(not all(fine))


if __name__ == "__main__":
    raise SystemExit(main())
