"""``plan``, ``models``, ``download``, ``doctor`` and ``show``: everything that generates nothing."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options

if TYPE_CHECKING:
    from ..presets import ModelPreset


def plan(
    model: options.Model = None,
    base: options.Base = None,
    variant: options.VariantOption = None,
    acceleration: options.AccelerationOption = None,
    size: options.Size = None,
    steps: options.Steps = None,
    vram: options.Vram = None,
    device: options.PlanDevice = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Host memory to plan with, such as 32GiB.")] = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    quantize: options.Quantize = None,
    compiled: options.Compile = None,
    requests: Annotated[
        int, typer.Option("--requests", min=1, help="How many are to come; whether compiling pays.")
    ] = 1,
    as_json: options.Json = False,
) -> None:
    from ..explore import plan_for
    from ..request import make_request
    from ..settings import make_settings

    settings = make_settings(
        variant or "standard",
        acceleration or "regular",
        vram=vram,
        dtype=dtype,
        attention=attention or "auto",
        quantize=quantize or "auto",
        compile=compiled,
        requests=requests,
    )
    fields = {"prompt": "a plan", "image_size": options.parse_size(size), "num_inference_steps": steps}
    request = make_request(settings.variant, fields)
    made = plan_for(model, settings, request, device, options.parse_amount("--ram", ram), base=base)
    print(json.dumps(made.to_dict()) if as_json else made)


def models(as_json: options.Json = False) -> None:
    from ..explore import survey

    rows = survey()
    if as_json:
        print(json.dumps([row.to_dict() for row in rows]))
        return
    wide = max(len(row.preset.name) for row in rows)
    for row in rows:
        print(
            f"{row.preset.name:<{wide}}  {row.state:<28} {row.preset.title}; {', '.join(row.preset.variants)}; {row.preset.licence}"
        )
        if row.fits:
            print(f"{'':<{wide}}  {row.fits}")
        for note in notes_of(row.preset):
            print(f"{'':<{wide}}  {note}")
    print(
        "\nA hub id, a folder in the hub layout, or a .safetensors or .gguf file with a transformer work as --model too."
    )


def notes_of(preset: ModelPreset) -> list[str]:
    """Each recipe's note once, with the variants that it is about."""
    notes: dict[str, list[str]] = {}
    for name, recipe in preset.variants.items():
        if recipe.note:
            notes.setdefault(recipe.note, []).append(name)
    return [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def download(
    name: Annotated[str, typer.Argument(help="A model's name, or a hub id (owner/name).")],
    only: Annotated[str | None, typer.Option("--only", help="Fetch only one of them: model, lora or safety.")] = None,
) -> None:
    from ..download import download as fetch
    from ..download import parts_of
    from ..errors import Cancelled, RequestError

    kinds = {"model": "model", "lora": "LoRA", "safety": "safety check"}
    if only is not None and only.lower() not in kinds:
        raise RequestError(f"--only must be one of {', '.join(kinds)}; {only!r} was given.")
    parts = parts_of(name)
    try:
        for part in parts:
            if only is None or part.purpose == kinds[only.lower()]:
                typer.echo(f"{part.purpose}: {part.repo}", err=True)
                print(fetch(part))
    except KeyboardInterrupt:
        raise Cancelled("Stopped. What has arrived is kept; run the command again to go on.") from None


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the device in about a second; plans go by the rates from then on.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    from ..explore import diagnosis

    facts = diagnosis(measure)
    if as_json:
        print(json.dumps(facts))
        return
    for title, rows in facts.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<22} {value}")
    width = shutil.get_terminal_size().columns
    print("-" * min(width, 60))
    print(f"Python {platform.python_version()} on {platform.platform()}")


def show(
    file: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    as_json: options.Json = False,
) -> None:
    from ..images import read_settings

    settings: dict[str, Any] = read_settings(file)
    if as_json:
        print(json.dumps(settings))
        return
    for name, value in settings.items():
        print(f"{name:<24} {value}")
