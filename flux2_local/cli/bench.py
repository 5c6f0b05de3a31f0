"""``flux2-local bench``, ``bench compare`` and ``bench report``."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options

app = typer.Typer(
    rich_markup_mode=None,
    help="Measure variants, tiers and other people's pipelines on the same components: seconds, memory, quality.\n\n"
    "Every contender draws the same prompts with the same seeds in turn, round after round, each in a process of its own. "
    "Quality is held against `standard, none`, the pixels of diffusers' pipeline; the contenders `none, another dtype` and "
    "`none, another kernel` show what rounding alone does. One that cannot run here is recorded with its reason.",
)
SIZES = ("512x512", "1024x768")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="A name, a hub id or a folder.")] = "tiny",
    size: Annotated[
        list[str] | None,
        typer.Option("--size", "-s", help="WIDTHxHEIGHT; may be repeated (default 512x512 and 1024x768)."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=4, max=50, help="Of the standard variant (default: the model's own).")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", min=1, help="Pictures per contender and size.")] = 5,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A contender by name; may be repeated (a wrong name lists them).")
    ] = None,
    apart: Annotated[
        bool, typer.Option("--apart", help="Load each anew every round: for models of which only one fits in memory.")
    ] = False,
    device: options.Device = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The JSON file to write.")] = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    from .. import rates, store
    from ..bench import environment, results, runner
    from ..bench.contenders import select
    from ..bench.subject import PROMPTS, Judged, Subject
    from ..errors import RequestError
    from ..files import check_folder
    from ..hardware import probe
    from ..request import make_request

    chosen = select(only)
    shapes = [
        make_request("standard", {"prompt": "a", "image_size": options.parse_size(s)}).size for s in size or SIZES
    ]
    checkpoint = store.find(model, "standard")
    steps = steps or checkpoint.preset.recipe("standard").steps
    judged: Judged | None = context.obj  # brought by benchmarks/speed.py
    if judged is not None and not checkpoint.bundled:
        raise RequestError(
            f"The judge knows the bundled model's scenes and nothing else, so it cannot judge {model}. "
            "Measure that without it: flux2-local bench."
        )
    prompts = PROMPTS if judged is None else judged.prompts
    hardware = probe(device)
    if out is not None:
        check_folder(out.absolute().parent, 2**20)
    record: dict[str, Any] = environment.record()
    if hardware.kind == "cuda":
        record |= dict(environment.card(hardware.device))
    dtypes = {"float32", *hardware.fast_dtypes}
    record["rates"] = reached = rates.measure(hardware.device, sorted(dtypes), seconds=0.5)
    record |= {"model": model, "steps": steps, "rounds": rounds, "prompts": prompts[:rounds], "rows": [], "refused": {}}
    rows: list[results.Row] = []
    for width, height in shapes:
        subject = Subject(model, hardware.device, width, height, steps)
        outcome = runner.run(chosen, subject, prompts, rounds, apart, lambda line: typer.echo(line, err=True))
        found = results.rows(outcome, subject, reached)
        if judged is not None:
            found = results.with_adherence(found, outcome, judged)
            right, asked = judged.ceiling(width, height, rounds)
            record.setdefault("adherence_of_drawings", {})[subject.size] = f"{100 * right / asked:.0f} % of {asked}"
        rows += found
        record["refused"][subject.size] = outcome.refused
    record["rows"] = [asdict(row) for row in rows]
    print(results.table(rows))
    for where, refused in record["refused"].items():
        for name, why in refused.items():
            print(f"not run at {where}: {name}: {why}")
    print(f"written: {environment.keep(record, 'speed', out)}")


@app.command(
    "compare", help="Say what changed between two results beyond noise; leaves with 1 where something got worse."
)
def compare(
    before: Annotated[Path, typer.Argument(help="A JSON file of `flux2-local bench`.")],
    after: Annotated[Path, typer.Argument(help="A later one.")],
    as_json: options.Json = False,
) -> None:
    from ..bench import compare as comparing

    found = comparing.compare(comparing.read(before), comparing.read(after))
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        for line in (*found.caveats, *found.changes):
            print(line)
        print(f"{len(found.worse)} of {len(found.changes)} figures got worse beyond noise")
    if found.worse:
        raise typer.Exit(1)


@app.command(
    "report", help="Write a result as a Markdown page with plots of seconds against quality, or a table into a page."
)
def report(
    result: Annotated[Path, typer.Argument(help="A JSON file of `flux2-local bench`.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write (default: beside the result).")
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            "--into", help="Only put a short table between the lines <!-- speed --> and <!-- /speed --> here."
        ),
    ] = None,
) -> None:
    from ..bench import report as reporting
    from ..bench.compare import read

    record = read(result)
    if into is not None:
        source = os.path.relpath(result.absolute(), into.absolute().parent).replace(os.sep, "/")
        written = [reporting.put(reporting.ratios(record, source), into)]
    else:
        written = reporting.report(record, out or result.with_suffix(".md"))
    for path in written:
        print(f"written: {path}")
