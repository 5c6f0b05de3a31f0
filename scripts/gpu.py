"""Everything that only an NVIDIA card can tell: kernels, then FLUX.2 at full size: tiers, memory budgets, how steps scale.

    make gpu                                  # everything, or: python scripts/gpu.py
    python scripts/gpu.py --dry-run           # the same code on a CPU: tiny shapes, Triton's interpreter, meaningless times

On an H200 everything is reckoned to take an hour and a half. Where a card is there for less, or commands may not take long, these are
the parts in the order of `make gpu`, what aims are about first, each reckoned to take the minutes that are said, less than ten:

    python scripts/gpu.py --op 'linear_w8*'                     # the kernels' part for some ops: 7
    python scripts/gpu.py --op '[!l]*'                          # for those of other names: 6
    python scripts/gpu.py --op 'linear_w4*'                     # 4
    python scripts/gpu.py --part tiers                          # beside diffusers: 6
    python scripts/gpu.py --part budgets                        # the cases that aims rest on: 7
    python scripts/gpu.py --part scaling                        # 2
    python scripts/gpu.py --part peers                          # other people's fast pipelines: 8
    python scripts/gpu.py --part more-budgets --budget 80GB     # the other cases, so for 32, 24, 16 and 8 GB: 4 to 8
    python scripts/gpu.py --part sanitizer                      # 5
    python scripts/gpu.py --tune --op swiglu                    # first choose these kernels' configurations, for tuned/sm_XX.json

Every command adds files of its own to benchmarks/results/ (or --out), which are written anew with every row, so that a command that
is stopped loses the row at work. A part runs in a process of its own and takes no other along; one that takes more than --minutes is
ended.

The kernels' part takes op by op. First correctness: every implementation and format against float64, and the kernel in its first
format in a CUDA graph and under torch.compile. Then its time at dev's and klein's shapes: ours beside torch op by op, inductor and the
best library, all as replays of CUDA graphs, beside how long a call keeps the host and the card's own rates (copy, matmuls). The
result is a CSV and a JSON record of the environment, the last line that is printed. The sanitizer's part is five ops' checks under
compute-sanitizer, where it is installed.

Tiers (benchmarks/tiers.py), there a round a contender, and budgets (benchmarks/budgets.py), there pictures of 8 steps, are of the
largest model that the card holds twice, dev on one of 141 GB, and steps of every one that it holds (benchmarks/scaling.py), all on
random weights that are drawn on the card. A part for which the card is too small is left out, and that is said. Exits with 1 if a
check, a row or a part failed.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib.util
import io
import json
import os
import re
import shutil
import signal
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
    from flux2_kernels.bench.report import Bench, Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("kernels", "tiers", "budgets", "scaling", "peers", "more-budgets", "sanitizer")
MODULES = {part: part for part in PARTS[1:4]} | {"peers": "tiers", "more-budgets": "budgets"}
"""The parts on whole models, and what measures them."""

FEW = ("--steps", "8", "--limit", "300")
CARD = {
    "tiers": ("--rounds", "1"),
    "budgets": ("--cases", "aims", *FEW),
    "peers": ("--rounds", "1"),
    "more-budgets": ("--cases", "others", *FEW),
}
"""Options of the models' parts on a card, beside its name and the model's: what keeps each below ten minutes."""

SMALL = ("--model", "tiny", "--device", "cpu", "--size", "512x512", "--steps", "4")
QUICK = {
    "tiers": (*SMALL, "--only", "none", "--only", "high, int8"),
    "budgets": (*SMALL, "--contender", "flux2-local", "--contender", "diffusers, group offload"),
    "scaling": ("--device", "cpu", "--rounds", "1"),
    "peers": (*SMALL, "--only", "cache-dit"),
    "more-budgets": (*SMALL, "--contender", "diffusers, resident"),
}
"""Options of the models' parts in a dry run."""

SANITIZED = ("modulated_norm_quantized", "gated_residual_norm", "qk_norm_rope", "swiglu_quantized", "linear_w8a8_gated")
FAILED = "FAILED"
"""What a check that failed is printed with."""

GRACE = 20
"""Seconds that a process which was interrupted has to end."""

PLACES = [str(ROOT), str(ROOT / "kernels")]
sys.path[:0] = PLACES


@dataclass(frozen=True)
class Run:
    """What was asked for, and where it runs; ``budgets`` is empty for all, and ``seconds`` is the longest that a part may take."""

    ops: tuple[Op, ...]
    place: Place
    device: torch.device
    folder: Path
    dry: bool
    tune: bool = False
    check_only: bool = False
    budgets: tuple[str, ...] = ()
    seconds: float = 3600

    def cases(self, op: Op) -> tuple[Case, ...]:
        """The models' shapes; two of the tests' in a dry run."""
        return op.cases[1:3] if self.dry else op.shapes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--op", action="append", help="the kernels' part for this op or those of a pattern; may be given again"
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given again")
    parser.add_argument("--budget", action="append", help="of the budgets' parts only this one; may be given again")
    parser.add_argument("--minutes", type=float, default=60, help="end a part that takes longer (default 60)")
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
        raise SystemExit(
            "Triton is not installed, and the kernels are written in it: pip install triton, on Windows triton-windows"
        )
    if not options.dry_run and (reason := obstacle()):
        raise SystemExit(reason)
    import torch
    from flux2_kernels import OPS, place_of

    if unknown := [pattern for pattern in options.op or () if not fnmatch.filter(OPS, pattern)]:
        raise SystemExit(f"no op {unknown[0]!r}; there are: {', '.join(OPS)}")
    if options.dry_run:
        from flux2_kernels.gpu.interpreter import act_like_hardware

        act_like_hardware()
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    folder = options.out or (Path(tempfile.mkdtemp(prefix="flux2-kernels-")) if options.dry_run else RESULTS)
    ops = tuple(op for name, op in OPS.items() if any(fnmatch.fnmatchcase(name, one) for one in options.op or "*"))
    limits = tuple(options.budget or ()), 60 * options.minutes
    return Run(ops, place_of(device), device, folder, options.dry_run, options.tune, options.check_only, *limits)


def check(run: Run, op: Op) -> list[Check]:
    """Every check of an op; prints a line and each failure."""
    from flux2_kernels.bench.checks import check_all, check_compiled, check_graph

    done = list(check_all(op, op.cases[:1] if run.dry else op.cases, run.place, run.device))
    form = op.formats[0]
    if not run.check_only:
        done.append(check_compiled(op, form, run.place, run.device, "aot_eager" if run.dry else "inductor"))
        if not run.dry:
            done.append(check_graph(op, form, run.place, run.device))
    worst, passed = max(one.share for one in done), sum(one.passed for one in done)
    print(f"{op.name}: {passed} of {len(done)} checks passed, largest error {worst:.2f} of its bound", flush=True)
    for one in done:
        if not one.passed:
            print(f"  {FAILED} {one.case} {one.form} {one.implementation}: {one.fault}", flush=True)
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
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    ran = ended(command, run.seconds, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran is None:
        return f"not run: it was not done after {run.seconds / 60:g} minutes"
    found, refused = re.search(r"ERROR SUMMARY: (\d+) error", ran.stdout), "not supported" in ran.stdout
    if not ran.returncode and not refused:
        return f"clean: {', '.join(names)}"
    if ((found and int(found[1])) or FAILED in ran.stdout) and not refused:
        return f"failed with {ran.returncode} in {', '.join(names)}: {ran.stdout[-2000:]}"
    return f"not run: it ended with {ran.returncode}: {ran.stdout[-2000:]}"  # containers may keep it from the card


def ended(command: list[str], seconds: float, **how: Any) -> subprocess.CompletedProcess[str] | None:
    """A process that has ended; None if it took too long, and was interrupted so that it ends what it started, too."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; the process would ignore it too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **how) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
            return subprocess.CompletedProcess(command, process.returncode, said)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
            return None


def tune(run: Run) -> Path:
    """Measure candidates for the kernels of the ops asked for, and use the choices from here on; the SM's table is written after each
    kernel, to the results too where a folder was named for them."""
    from flux2_kernels import tables
    from flux2_kernels.bench.tuning import Tuner, ops_of, written

    sm, few = run.place.sm or 89, ("modulated_norm", "linear_w4a8", "scale")
    asked = {op.name for op in run.ops}
    kernels = [k for k in tables.table(sm)["configs"] if asked & ops_of(k) and (not run.dry or k in few)]
    place = run.place if run.place.sm else type(run.place)("cpu", sm, triton=True, interpreter=True)
    cut = (lambda op, case: op.cases[1]) if run.dry else (lambda op, case: case)
    tuner = Tuner(place, run.device, cut, most=2 if run.dry else None)
    own = [run.folder] if run.dry or run.folder != RESULTS else []
    folders = own if run.dry else [tables.FOLDER, *own]
    for table in tuner.tables(tables.table(sm), card(run), kernels, sorted(asked)):
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"sm_{sm}.json").write_text(written(table))
        tables.forget()
    return folders[0] / f"sm_{sm}.json"


def card(run: Run) -> str:
    import torch

    return "dry run" if run.dry else torch.cuda.get_device_name(run.device)


def bench_here(run: Run, record: dict[str, Any]) -> Bench:
    """The card's rates, into the record, and what measures by them."""
    from flux2_kernels.bench.report import Bench, rates_record
    from flux2_kernels.bench.timing import measured_rates

    rates = measured_rates(run.device, run.place.sm, 64 if run.dry else 8192)
    record["rates"] = rates_record(rates)
    print("measured: " + ", ".join(f"{name} {value:.4g}" for name, value in record["rates"].items()), flush=True)
    return Bench(run.place, run.device, rates, "aot_eager" if run.dry else "inductor")


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
    """The kernels' part, op by op; whether all is well."""
    from flux2_local.bench.environment import software

    if run.check_only:
        found = [one for op in run.ops for one in check(run, op)]
        return all(one.passed for one in found)
    record: dict[str, Any] = dict(software()) | dict(card_record(run)) | {"checks": 0, "failed": []}
    rows: list[Row] = []
    if run.tune:
        record["tuned"] = tune(run).name
    bench = bench_here(run, record)
    for op in run.ops:
        checks = check(run, op)
        record["checks"] += len(checks)
        record["failed"] += [f"{c.op} {c.case} {c.form} {c.implementation}: {c.fault}" for c in checks if not c.passed]
        path = write(run, rows, record)
        for row in bench.rows(op, run.cases(op)):
            print(line(row), flush=True)
            rows.append(row)
            if row.problem:
                record["failed"].append(f"{row.op} {row.shape} {row.format} {row.implementation}: {row.problem}")
            record["aims"] = aims(rows)
            write(run, rows, record)
    print(f"written: {path} and {path.with_suffix('.json').name}")
    print(json.dumps(record))
    return not record["failed"]


def sanitizer(run: Run) -> bool:
    """The sanitizer's part; whether all is well."""
    from flux2_local import files
    from flux2_local.bench.environment import software

    record = dict(software()) | dict(card_record(run)) | {"sanitizer": sanitize(run)}
    path = files.free_name(run.folder / f"sanitizer-{record['date'][:10]}.json")
    files.write(path, (json.dumps(record, indent=2) + "\n").encode())
    print(f"{record['sanitizer']}\nwritten: {path}", flush=True)
    return not record["sanitizer"].startswith("failed")


def extent(run: Run, part: str) -> tuple[str, ...]:
    """The options of a part on whole models: of how large a model it is.

    Raises:
        BackendUnavailableError: the card holds none.
    """
    if run.dry:
        return QUICK[part]
    options = ["--device", str(run.device), *CARD.get(part, ())]
    if part == "scaling":  # it takes every one that fits
        return tuple(options)
    from benchmarks import tiers
    from flux2_local.hardware import probe

    options += ["--model", tiers.largest(probe(str(run.device)))]
    names = {"tiers": tiers.OURS, "peers": tiers.PEERS}.get(part, ())
    options += [one for name in names for one in ("--only", name)]
    if MODULES[part] == "budgets":
        options += [one for budget in run.budgets for one in ("--budget", budget)]
    return tuple(options)


def models(run: Run, part: str) -> bool:
    """One of the parts on whole models; whether all is well."""
    from flux2_local import files
    from flux2_local.errors import BackendUnavailableError

    try:
        options = extent(run, part)
    except BackendUnavailableError as error:
        print(f"{part} left out: {error}", flush=True)
        return True
    out = files.free_name(run.folder / f"{part}-{time.strftime('%Y-%m-%d')}.json")
    run.folder.mkdir(parents=True, exist_ok=True)
    return apart(run, part, ["-m", f"benchmarks.{MODULES[part]}", "--out", str(out), *options])


def apart(run: Run, part: str, arguments: Sequence[str]) -> bool:
    """Python with ``arguments`` in a process of its own, which leaves the card empty, and whole; whether all is well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*PLACES, *filter(None, [os.environ.get("PYTHONPATH")])])
    print(f"{part}:", flush=True)
    ran = ended([sys.executable, *arguments], run.seconds, cwd=ROOT, env=environment)
    if ran is None:
        print(f"{part} was ended after {run.seconds / 60:g} minutes; what it had found is written", flush=True)
    return ran is not None and ran.returncode == 0


def again(run: Run) -> list[str]:
    """This script's arguments for the kernels' part alone."""
    given = [str(Path(__file__).absolute()), "--part", "kernels", "--out", str(run.folder.absolute())]
    given += [one for op in run.ops for one in ("--op", op.name)]
    return given + ["--dry-run"] * run.dry + ["--tune"] * run.tune + ["--check-only"] * run.check_only


def well(run: Run, part: str, alone: bool) -> bool:
    """Whether all is well with one part; an exception is printed, and takes no other part along.

    Args:
        alone: it is the only one, so that the kernels' needs no process of its own.
    """
    try:
        if part == "kernels":
            return kernels(run) if alone else apart(run, part, again(run))
        return sanitizer(run) if part == "sanitizer" else models(run, part)
    except Exception:
        traceback.print_exc()
        return False


def main() -> int:
    options = parse()
    run = prepare(options)
    wanted = options.part or (["kernels"] if options.op or options.check_only else PARTS)
    fine = [well(run, part, alone=len(wanted) == 1) for part in PARTS if part in wanted]
    return int(not all(fine))


if __name__ == "__main__":
    raise SystemExit(main())
