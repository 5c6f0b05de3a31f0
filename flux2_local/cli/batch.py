"""``flux2-local batch`` and ``sheet``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Cancelled, RequestError
from . import generate, options
from .progress import Meter, duration, speed

if TYPE_CHECKING:
    from ..batch.choice import EngineChoice
    from ..batch.job import Job
    from ..batch.run import Batch, Target

FAILED = 1
SHOWN = 20

Prompts = Annotated[
    Path,
    typer.Argument(
        help="JSONL (a request's fields per line, or a prompt in quotes), CSV (the first row names fields) or plain text "
        "(a prompt per line); - reads standard input.",
        show_default=False,
    ),
]


class Stop:
    """Ctrl-C, and what a scheduler sends before it kills: the first asks to stop, the second stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> bool:
        return self.asked

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def batch(
    prompts: Prompts,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("outputs/batch"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is in the folder; the same command otherwise.")
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Begin anew: the pictures of the batch that is there go once the model is loaded."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the lines and predict pictures, time and disk.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Do nothing at all if any line is bad (default: do the others).")
    ] = False,
    repeat: Annotated[int, typer.Option("--repeat", help="Pictures per line, with consecutive seeds.")] = 1,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="Make every line with each of these seeds, such as 1,2,10-19.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid",
            metavar="FIELD=VALUE,…",
            help="Make every line with each of the values; several --grid make all combinations.",
        ),
    ] = None,
    job_seed: Annotated[int, typer.Option("--job-seed", help="Where the seeds of lines without one come from.")] = 0,
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            help="files (with manifest.jsonl), imagefolder (train/ with metadata.jsonl, as Hugging Face datasets reads) or "
            "webdataset (tar shards).",
        ),
    ] = "files",
    shard_size: Annotated[int, typer.Option("--shard-size", help="Pictures per WebDataset shard.")] = 1000,
    parquet: Annotated[
        bool, typer.Option("--parquet", help="Write the manifest as manifest.parquet too, at the end.")
    ] = False,
    input_format: Annotated[
        str | None, typer.Option("--input-format", help="jsonl, csv or text (default: by the file's ending).")
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option("--devices", help="One process per device, such as cuda:0,cuda:1 (default: this process alone)."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option("--engine", help="local, or ray: the workers of a Ray cluster (RAY_ADDRESS, else this machine)."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="With --engine ray: how many (default: one per card, or as many as the cores take)."
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", help="Processor threads of each process; another number can move last bits."),
    ] = None,
    model: options.Model = None,
    variant: options.VariantOption = None,
    acceleration: options.AccelerationOption = None,
    size: options.Size = None,
    steps: options.Steps = None,
    guidance: generate.Guidance = None,
    expand: generate.Expand = None,
    form: Annotated[str | None, typer.Option("--format", "-f", help="png, jpeg or webp (default png).")] = None,
    safety_checker: generate.Safety = None,
    lora: options.LoraOption = None,
    vram: options.Vram = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    quantize: options.Quantize = None,
    compiled: options.Compile = None,
    keep_prompts: options.KeepPrompts = None,
    base: options.Base = None,
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    from ..batch.choice import EngineChoice
    from ..batch.run import Target

    defaults = {
        "guidance_scale": guidance, "num_inference_steps": steps, "image_size": options.parse_size(size),
        "enable_prompt_expansion": expand, "enable_safety_checker": safety_checker, "output_format": form,
    }  # fmt: skip
    loading = {
        "model": model, "variant": variant or "standard", "acceleration": acceleration, "vram": vram, "device": device,
        "lora": options.parse_loras(lora) or None, "dtype": dtype,
        "attention": attention, "quantize": quantize, "compile": compiled, "keep_prompts": keep_prompts, "base": base,
    }  # fmt: skip
    loading = {k: v for k, v in loading.items() if v is not None}
    if resume and overwrite:
        raise RequestError("--resume goes on and --overwrite begins anew; say one of them.")
    if devices is not None and device is not None:
        raise RequestError("--device names one device and --devices several; say one of them.")
    if parquet:
        from ..batch.manifest import require_parquet

        require_parquet()
    names = [name.strip() for name in devices.split(",")] if devices else []
    choice = EngineChoice(loading, engine, names, workers, threads)
    job = read_job(prompts, input_format, loading, defaults, (grid, seeds, repeat, job_seed), strict, as_json)
    choice = replace(choice, loading={**loading, "requests": max(1, job.count // (len(names) or workers or 1))})
    target = Target(output, layout, shard_size, resume, overwrite)
    if dry_run:
        predict(job, target, choice.loading, as_json)
    else:
        run(job, target, choice, parquet, as_json, quiet)
    if job.bad:
        raise typer.Exit(FAILED)


def read_job(
    prompts: Path,
    input_format: str | None,
    loading: dict[str, Any],
    defaults: dict[str, Any],
    sweep: tuple[list[str] | None, str | None, int, int],
    strict: bool,
    as_json: bool,
) -> Job:
    """Read and check every line.

    Raises:
        RequestError: the options are wrong, no line is good, or with ``strict`` any is bad.
    """
    from ..batch import lines
    from ..batch.job import Sweep, make_job, parse_grid, parse_seeds
    from ..request import make_request
    from ..settings import settings_of

    grid, seeds, repeat, job_seed = sweep
    variant = settings_of(loading).variant
    defaults = {k: v for k, v in defaults.items() if v is not None}
    make_request(variant, {"prompt": "a check of the options", **defaults})
    if variant != "standard" and "acceleration" in loading:
        make_request(variant, {"prompt": "a check of the options", "acceleration": loading["acceleration"]})
    values = parse_grid(grid or ())
    if seeds is not None:
        if "seed" in values:
            raise RequestError("--seeds and --grid seed=… say the same thing; say one of them.")
        values["seed"] = parse_seeds(seeds)
    job = make_job(lines.read(prompts, input_format), Sweep(variant, defaults, values, repeat, job_seed))
    if not as_json:
        tell_bad(job)
    if strict and job.bad:
        raise RequestError(
            f"{len(job.bad)} of the lines cannot be used, and --strict says to do all or nothing; nothing was done. The first "
            f"is line {job.bad[0].number}: {job.bad[0].reason}"
        )
    if not job.lines:
        first = f" Line {job.bad[0].number}: {job.bad[0].reason}" if job.bad else ""
        raise RequestError(f"There is no line to make a picture of in {prompts}.{first}")
    return job


def tell_bad(job: Job) -> None:
    """The lines that cannot be used, the first of them by name."""
    for bad in job.bad[:SHOWN]:
        print(f"line {bad.number}: {bad.reason}", file=sys.stderr)
    if len(job.bad) > SHOWN:
        print(f"and {len(job.bad) - SHOWN} more bad lines (--json lists all)", file=sys.stderr)


def predict(job: Job, target: Target, loading: dict[str, Any], as_json: bool) -> None:
    """What ``--dry-run`` prints."""
    from ..batch.forecast import forecast
    from ..presets import show_bytes
    from ..settings import settings_of

    told = forecast(job, loading.get("model"), settings_of(loading), loading.get("device"))
    if as_json:
        facts = {
            "pictures": job.count,
            "lines": len(job.lines),
            "bad_lines": bad_lines(job),
            "folder": str(target.folder),
        }
        print(json.dumps({**facts, **told.to_dict()}))
        return
    print(f"{job.count} pictures of {len(job.lines)} lines, {told.prompts} prompts to read, {len(job.bad)} bad lines")
    for share in told.shares:
        work = share.plan.work
        print(
            f"  {share.count} at {work.width}×{work.height}, {work.steps} steps, {share.plan.acceleration}: "
            f"{share.plan.seconds:.2f} s each"
        )
    print(
        f"predicted: {duration(told.seconds)} on one device, {told.per_hour:.0f} pictures an hour, and {show_bytes(told.size)} in "
        f"{target.folder}"
    )
    for share in told.shares[:1]:
        print(share.plan)


def run(job: Job, target: Target, choice: EngineChoice, parquet: bool, as_json: bool, quiet: bool) -> None:
    """Open the folder, load, make the pictures, say how it went.

    Raises:
        Cancelled: after Ctrl-C, with what is kept.
    """
    from ..batch.manifest import to_parquet
    from ..batch.run import open_batch

    meter, stop = Meter(not (as_json or quiet)), Stop()
    with open_batch(job, target) as work:
        if work.left:
            with choice.loaded(stop) as (engine, about), stop.listening():
                for line in about if meter.show else ():
                    meter.say(line)
                for note in work.settle(engine.facts):
                    meter.say(f"note: {note}")
                try:
                    work.work(engine, meter)
                except (Cancelled, KeyboardInterrupt) as end:
                    instead = " in place of --overwrite" if target.overwrite else ""
                    raise Cancelled(
                        f"Stopped: {work.before + work.made} of {job.count} pictures are finished and kept in "
                        f"{target.folder}. The same command with --resume{instead} goes on."
                    ) from end
                finally:
                    if meter.show and meter.live:
                        print(file=sys.stderr)
    manifest = work.store.manifest
    written = to_parquet(manifest, target.folder / "manifest.parquet") if parquet else None
    report(work, written, as_json, quiet)
    if work.failures:
        raise typer.Exit(FAILED)


def bad_lines(job: Job) -> list[dict[str, Any]]:
    return [{"line": bad.number, "reason": bad.reason} for bad in job.bad]


def report(work: Batch, parquet: Path | None, as_json: bool, quiet: bool) -> None:
    """How it went."""
    if as_json:
        facts = {
            "pictures": work.job.count,
            "made": work.made,
            "already_there": work.before,
            "failures": [{"line": f.line, "picture": f.number, "reason": f.reason} for f in work.failures],
            "bad_lines": bad_lines(work.job),
            "seconds": round(work.seconds, 3),
            "folder": str(work.target.folder),
            "manifest": str(work.store.manifest),
            "parquet": None if parquet is None else str(parquet),
        }
        print(json.dumps(facts))
    elif not quiet:
        there = f", {work.before} were there" if work.before else ""
        failed = f", {len(work.failures)} failed (--resume tries them again)" if work.failures else ""
        bad = f", {len(work.job.bad)} bad lines" if work.job.bad else ""
        timing = f" in {duration(work.seconds)} ({speed(work.rate)})" if work.made else ""
        print(f"{work.made} pictures made{timing}{there}{failed}{bad}: {work.store.manifest}")


def sheet(
    folder: Annotated[Path, typer.Argument(help="A folder that `flux2-local batch` wrote.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The contact sheet (default FOLDER/sheet.png).")
    ] = None,
    gallery: Annotated[
        Path | None, typer.Option("--gallery", help="The gallery (default FOLDER/gallery.html).")
    ] = None,
    columns: Annotated[int, typer.Option("--columns", help="Pictures side by side on the sheet.")] = 6,
    thumb: Annotated[int, typer.Option("--thumb", help="Longest side of a small picture, in pixels.")] = 256,
    limit: Annotated[int, typer.Option("--limit", help="Pictures at most.")] = 500,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over files that are there.")] = False,
) -> None:
    from ..batch.sheet import make_sheets

    first, second = output or folder / "sheet.png", gallery or folder / "gallery.html"
    drawn, page, _ = make_sheets(folder, first, second, columns=columns, side=thumb, limit=limit, overwrite=overwrite)
    print(drawn)
    print(page)
