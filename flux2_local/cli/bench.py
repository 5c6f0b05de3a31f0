"""``flux2-local bench``, ``bench compare`` and ``bench report``."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from ..errors import Cancelled
from . import options

app = typer.Typer(
    rich_markup_mode=None,
    help="Measure variants, tiers and other people's pipelines on the same components: seconds, memory, quality.\n\n"
    "Every contender draws the same prompts with the same seeds in turn, round after round, each in a process of its own. "
    "Quality is held against `standard, none`, the pixels of diffusers' pipeline; the contenders `none, another dtype` and "
    "`none, another kernel` show what rounding alone does. One that cannot run here, fails or exceeds --limit is recorded with "
    "its reason, and so is what was not asked for. Ctrl-C leaves the result of what was measured by then.",
)
SIZES = ("512x512", "1024x768")


@app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help="A name, a hub id or a folder.")] = "tiny",
    size: Annotated[
        list[str] | None,
        typer.Option("--size", "-s", metavar="WIDTHxHEIGHT", help="May be repeated (default 512x512 and 1024x768)."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=4, max=50, help="Of the standard variant (default: the model's own).")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", min=1, help="Pictures per contender and size.")] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help="A contender by name, and the two that others are held against; may be repeated (a wrong name lists them).",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every contender: the exact and the high tier of turbo and flash too.")
    ] = False,
    apart: Annotated[
        bool | None,
        typer.Option(
            "--apart/--together",
            help="Load each anew for every round, one at a time, or all at the beginning. Default: together where they fit into "
            "memory.",
        ),
    ] = None,
    warm_steps: Annotated[
        int | None,
        typer.Option(
            "--warm-steps",
            min=1,
            help="Steps of the first picture, which is not counted. Default: 1, and all where a contender compiles.",
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            "--limit",
            min=0.001,
            help="Seconds that a picture may take, and loading. A contender that takes more is stopped and recorded with it.",
        ),
    ] = None,
    device: options.Device = None,
    label: Annotated[
        str | None, typer.Option("--label", help="What the result calls the model (default: as --model does).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The JSON file to write, anew after every picture. Default: speed-DATE.json."),
    ] = None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    from ..bench import report as reporting
    from ..bench import results
    from ..bench.contenders import select
    from ..bench.measurement import Wanted, measure
    from ..bench.runner import Rules
    from ..request import make_request

    shapes = [
        make_request("standard", {"prompt": "a", "image_size": options.parse_size(s)}).size for s in size or SIZES
    ]
    rules = Rules(rounds, apart, warm_steps, limit)
    wanted = Wanted(model, shapes, select(only, every), rules, steps, device, out, context.obj, label)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measured = measure(wanted, lambda line: typer.echo(line, err=True))
    finally:
        signal.signal(signal.SIGTERM, before)
    record, rows = measured.record, [row for rows in measured.rows.values() for row in rows]
    if not rows and measured.stopped:
        raise Cancelled("Stopped before the first picture; nothing was written.")
    print(results.table(rows, reporting.references(record)[1]))
    for where, refused in record["refused"].items():
        ran = {row.name for row in rows if row.size == where}
        for name, why in refused.items():
            print(f"{'stopped' if name in ran else 'not run'} at {where}: {name}: {why}")
    if absent := reporting.not_measured(record):
        print(absent)
    print(f"written: {measured.path}")
    if measured.stopped:
        done = ", ".join(f"{done} of {rounds} rounds at {where}" for where, done in record["rounds_done"].items())
        raise Cancelled(f"Stopped after {done}; what was measured is in {measured.path}.")


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
