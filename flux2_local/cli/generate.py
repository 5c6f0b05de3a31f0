"""``flux2-local generate`` and ``edit``."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeGuard

import typer

from ..errors import RequestError
from . import options

if TYPE_CHECKING:
    from ..pipeline import Flux2
    from ..result import Result

DEFAULT_FOLDER = Path("outputs")

Prompt = Annotated[str | None, typer.Argument(help="What to draw. - reads it from standard input.", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="File (.png, .jpg, .webp) or folder to write to (default outputs/).", show_default=False
    ),
]
Images = Annotated[
    list[str] | None,
    typer.Option("--image", "-i", metavar="FILE|URL", help="Reference picture; may be repeated."),
]
Number = Annotated[int | None, typer.Option("--num-images", "-n", help="1 to 4 (default 1).")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the first picture (default random).")]
Guidance = Annotated[float | None, typer.Option("--guidance", "-g", help="guidance_scale, 0 to 20 (default 2.5).")]
Expand = Annotated[
    bool | None, typer.Option("--expand", help="Let the model's language model rewrite the prompt first.")
]
Format = Annotated[
    str | None, typer.Option("--format", "-f", help="png, jpeg or webp (default png, or the output's ending).")
]
Safety = Annotated[
    bool | None,
    typer.Option("--safety-checker/--no-safety-checker", help="Check pictures and blacken flagged ones (default on)."),
]
From = Annotated[Path | None, typer.Option("--from", help="Repeat the picture in this file; other options change it.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the paths.")]


def generate(
    prompt: Prompt = None,
    output: Output = None,
    model: options.Model = None,
    variant: options.VariantOption = None,
    acceleration: options.AccelerationOption = None,
    size: options.Size = None,
    number: Number = None,
    seed: Seed = None,
    steps: options.Steps = None,
    guidance: Guidance = None,
    image: Images = None,
    expand: Expand = None,
    form: Format = None,
    safety_checker: Safety = None,
    lora: options.LoraOption = None,
    vram: options.Vram = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    attention: options.Attention = None,
    quantize: options.Quantize = None,
    compiled: options.Compile = None,
    keep_prompts: options.KeepPrompts = None,
    base: options.Base = None,
    repeat: From = None,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    given = {
        "prompt": prompt,
        "guidance_scale": guidance,
        "seed": seed,
        "num_inference_steps": steps,
        "image_size": options.parse_size(size),
        "num_images": number,
        "acceleration": acceleration,
        "enable_prompt_expansion": expand,
        "enable_safety_checker": safety_checker,
        "output_format": format_for(output, form),
        "images": tuple(image) if image else None,
    }
    loading = {
        "model": model,
        "variant": variant,
        "acceleration": acceleration,
        "lora": options.parse_loras(lora) or None,
        "vram": vram,
        "device": device,
        "dtype": dtype,
        "attention": attention,
        "quantize": quantize,
        "compile": compiled,
        "keep_prompts": keep_prompts,
        "base": base,
    }
    if repeat is not None:
        fields, loading = from_picture(repeat, given, loading)
    else:
        fields = {k: v for k, v in given.items() if v is not None}
    run(fields, {k: v for k, v in loading.items() if v is not None}, output, as_json, quiet)


@wraps(generate)
def edit(**given: Any) -> None:
    """As :func:`generate`, with all of its options."""
    if not given["image"]:
        raise RequestError("edit changes pictures, and none was given. Name one with --image.")
    generate(**given)


def names_file(output: Path | None) -> TypeGuard[Path]:
    """Whether ``output`` is a file to write, rather than a folder to write into."""
    return output is not None and bool(output.suffix) and not output.is_dir()


def format_for(output: Path | None, form: str | None) -> str | None:
    """The format to write: ``form``, else what the output's ending says, if it has one.

    Raises:
        RequestError: they say different things.
    """
    from ..images import format_of

    if not names_file(output):
        return form
    ending = format_of(output, "png")
    if form not in (None, ending):
        raise RequestError(f"--format {form} and the ending of {output} say different things; leave one of them out.")
    return ending


def from_picture(path: Path, given: dict[str, Any], loading: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and loading arguments that repeat the picture at ``path``; what is given besides wins."""
    from ..images import check_references, read_settings
    from ..request import STANDARD_ONLY, Request

    kept = read_settings(path)
    try:
        check_references(() if given["images"] else tuple(kept.get("images", ())))
    except RequestError as error:
        raise RequestError(
            f"{path} was made with reference pictures that are not here any more; name them with --image. {error}"
        ) from error
    fields = {k: v for k, v in kept.items() if k in Request.model_fields and k not in STANDARD_ONLY}
    if "expanded_prompt" in kept and given["prompt"] is None and not given["enable_prompt_expansion"]:
        fields |= {"prompt": kept["expanded_prompt"], "enable_prompt_expansion": False}
    same = {k: kept.get(k) for k in ("variant", "dtype", "attention", "quantize")}
    same["lora"] = [(name, strength) for name, strength in kept.get("lora", [])] or None
    if loading["model"] is None:
        same |= {"model": kept.get("model"), "base": kept.get("base")}
    if loading["variant"] in (None, kept.get("variant")):  # another one has its own
        same["acceleration"] = kept.get("acceleration")
        if kept.get("variant") == "standard":
            fields["num_inference_steps"] = kept.get("steps")
    fields |= {k: v for k, v in given.items() if v is not None}
    return fields, {**same, **{k: v for k, v in loading.items() if v is not None}}


def run(fields: dict[str, Any], loading: dict[str, Any], output: Path | None, as_json: bool, quiet: bool) -> None:
    """Check, load, generate, write, report."""
    from ..files import home
    from ..images import check_references
    from ..request import make_request

    output = home(output) if output is not None else None
    loading.setdefault("variant", "standard")
    if loading["variant"] in ("standard", "turbo", "flash"):
        request = make_request(loading["variant"], fields)
        check_target(output, request.num_images, request.size)
        check_references(request.images)

    from ..pipeline import Flux2
    from .progress import Display

    with Display(show=not (as_json or quiet)) as display:
        display.say_loading(loading.get("model"))
        flux = Flux2.load(**loading)
        display.say_model(flux)
        result = flux.generate(progress=display, **fields)
    report(flux, write(result, output), as_json, quiet)


def check_target(output: Path | None, count: int, size: tuple[int, int]) -> None:
    """Refuse now what could not be written later."""
    from ..files import check_folder

    target = output or DEFAULT_FOLDER
    folder = target.parent if names_file(target) else target
    check_folder(folder, count * size[0] * size[1] * 3 + 2**20)


def write(result: Result, output: Path | None) -> Result:
    """Write every picture; with a file's name and several pictures, the second is name-2, and so on."""
    if not names_file(output):
        return result.kept(output or DEFAULT_FOLDER)
    names = [output if i == 0 else output.with_stem(f"{output.stem}-{i + 1}") for i in range(len(result.images))]
    written = (
        replace(image, path=image.save(name), file_name=name.name)
        for image, name in zip(result.images, names, strict=True)
    )
    return replace(result, images=tuple(written))


def report(flux: Flux2, result: Result, as_json: bool, quiet: bool) -> None:
    """Say what was written where."""
    if as_json:
        facts = {"model": flux.checkpoint.name, "variant": flux.settings.variant, "notes": result.notes}
        print(json.dumps({**result.to_dict(), **facts}))
        return
    for number, image in enumerate(result.images):
        flagged = "  (flagged by the safety check, blackened)" if result.has_nsfw_concepts[number] else ""
        print(f"{image.path}" if quiet else f"{image.path}  seed {result.seed + number}{flagged}")
    if quiet:
        return
    if result.prompt != flux_prompt(result):
        print(f"expanded prompt: {result.prompt}")
    t = result.timings
    stages = {"prompt expansion": t.expand, "prompt": t.encode, "references": t.references, "denoising": t.denoise}
    stages |= {"decoding": t.decode, "safety check": t.safety}
    print(f"{t.total:.2f} s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items() if seconds))
    for note in result.notes:
        if note not in flux.notes:
            print(f"note: {note}")


def flux_prompt(result: Result) -> str:
    """The prompt as the user wrote it."""
    return str(result.images[0].settings["prompt"])
