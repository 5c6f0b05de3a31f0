"""Options that several commands share, each defined once."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import RequestError
from ..presets import parse_bytes
from ..request import ACCELERATIONS, SIZES, VARIANTS
from ..request import parse_size as parse_size


def _one_of(values: tuple[str, ...]) -> str:
    return ", ".join(values)


Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A name (see `flux2-local models`), hub id, folder, .safetensors or .gguf file. "
        "Default: the best one on this disk that fits.", show_default=False,
    ),
]  # fmt: skip
Base = Annotated[
    str | None,
    typer.Option("--base", help="For a single file: the model that its text encoder and autoencoder come from."),
]
VariantOption = Annotated[str | None, typer.Option("--variant", "-v", help=f"{_one_of(VARIANTS)} (default standard).")]
AccelerationOption = Annotated[
    str | None, typer.Option("--acceleration", "-a", help=f"{_one_of(ACCELERATIONS)} (default regular; standard only).")
]
Vram = Annotated[
    str | None, typer.Option("--vram", help="Device memory that may be used, such as 12GiB. Default: what is free.")
]
Device = Annotated[str | None, typer.Option("--device", help="cuda, cuda:1, mps or cpu. Default: the best there is.")]
PlanDevice = Annotated[
    str | None,
    typer.Option("--device", help="cuda, mps, cpu, or a card by name, such as rtx-4090 (a wrong name lists them)."),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Insist on float32, bfloat16 or float16.")]
Attention = Annotated[
    str | None,
    typer.Option("--attention", help="Insist on an attention backend (a wrong name lists them). Default: the fastest."),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        help="auto (where memory demands it), none, builtin, or a weight format by name (a wrong one lists them).",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="torch.compile the transformer: slow to start, for hundreds of pictures. Default: what the plan says.",
    ),
]
KeepPrompts = Annotated[
    bool | None,
    typer.Option(
        "--keep-prompts",
        help="Keep prompts' embeddings (not the prompts) in the cache folder: the same prompt is drawn sooner next time.",
    ),
]
LoraOption = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE[=STRENGTH]", help="LoRA file to merge in; may be repeated.")
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", "-s", help=f"{_one_of(tuple(SIZES))}, or WIDTHxHEIGHT, each 512 to 2048 (default landscape_4_3)."
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="num_inference_steps, 4 to 50, standard only (default 28, or the model's own)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def parse_amount(option: str, text: str | None) -> int | None:
    """Bytes from text such as 32GiB.

    Raises:
        RequestError: not such a text.
    """
    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise RequestError(f"{option}: {error}") from error


def parse_loras(texts: list[str] | None) -> list[tuple[str, float]]:
    """FILE or FILE=STRENGTH, repeated."""
    out = []
    for text in texts or []:
        name, equals, strength = text.rpartition("=")
        try:
            out.append((name, float(strength)) if equals else (text, 1.0))
        except ValueError:
            out.append((text, 1.0))
    return out
