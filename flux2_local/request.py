"""What a caller may ask for: fal.ai's flux-2 input schema, validated once and frozen.

Sources: ``spec`` of fal-ai/flux-2 (fields, defaults, ranges) and its size presets.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import RequestError

Variant = Literal["standard", "turbo", "flash"]
Acceleration = Literal["none", "regular", "high"]
OutputFormat = Literal["jpeg", "png", "webp"]

VARIANTS: tuple[Variant, ...] = ("standard", "turbo", "flash")
ACCELERATIONS: tuple[Acceleration, ...] = ("none", "regular", "high")

SIZES: dict[str, tuple[int, int]] = {
    "square_hd": (1024, 1024),
    "square": (512, 512),
    "portrait_4_3": (768, 1024),
    "portrait_16_9": (576, 1024),
    "landscape_4_3": (1024, 768),
    "landscape_16_9": (1024, 576),
}
"""Width and height in pixels of the named sizes."""

SizeName = Literal["square_hd", "square", "portrait_4_3", "portrait_16_9", "landscape_4_3", "landscape_16_9"]
MIN_SIDE, MAX_SIDE = 512, 2048
MAX_SEED = 2**63 - 5
"""torch's generators take any 64-bit seed; the last image of a request uses seed + 3."""

RANDOM_SEEDS = 2**53
"""Seeds drawn here stay below this, so that JavaScript's numbers hold them exactly."""

MAX_REFERENCES = 10
"""FLUX.2 accepts up to ten reference pictures (model card of FLUX.2 [dev])."""

EMPTY = "the prompt is empty; describe the picture in a few words"
STANDARD_ONLY = ("num_inference_steps", "acceleration")
"""Fields that the turbo and flash variants fix themselves."""


class ImageSize(BaseModel):
    """A size in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(512, ge=MIN_SIDE, le=MAX_SIDE, description="The width of the generated image.")
    height: int = Field(512, ge=MIN_SIDE, le=MAX_SIDE, description="The height of the generated image.")


class Request(BaseModel):
    """One call. Every field but ``images`` is fal's, with fal's default and range.

    Attributes:
        prompt: what to draw; not empty.
        guidance_scale: how closely to follow the prompt, 0 to 20. Ignored by step-distilled klein models.
        seed: of the first image; image i is what seed + i gives alone. Random below 2^53 when left out.
        num_inference_steps: 4 to 50, standard only. Left out, the variant's own number (28 for standard).
        image_size: a preset's name, or width and height, each 512 to 2048 pixels.
        num_images: how many to make, 1 to 4.
        acceleration: "none", "regular" or "high", standard only. Left out, the one that the pipeline was loaded with.
        enable_prompt_expansion: let the pipeline's language model rewrite the prompt first.
        sync_mode: give pictures as data URIs and keep nothing.
        enable_safety_checker: check pictures; a flagged one comes back black.
        output_format: "png", "jpeg" or "webp".
        images: reference pictures for editing: file paths, http(s) or data URLs, or PIL images; at most ten.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    prompt: str = Field(description="The prompt to generate an image from.", min_length=1)
    guidance_scale: float = Field(2.5, ge=0, le=20, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    num_inference_steps: int | None = Field(None, ge=4, le=50)
    image_size: ImageSize | SizeName = "landscape_4_3"
    num_images: int = Field(1, ge=1, le=4)
    acceleration: Acceleration | None = None
    enable_prompt_expansion: bool = False
    sync_mode: bool = False
    enable_safety_checker: bool = True
    output_format: OutputFormat = "png"
    images: tuple[Any, ...] = Field((), max_length=MAX_REFERENCES)

    @field_validator("prompt")
    @classmethod
    def _prompt_says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError(EMPTY)
        return value

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        if isinstance(self.image_size, ImageSize):
            return self.image_size.width, self.image_size.height
        return SIZES[self.image_size]

    def given(self) -> dict[str, Any]:
        """What it says and does not leave to the default."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def seeded(self) -> Request:
        """This request with a seed: its own, or a random one below 2^53."""
        return self if self.seed is not None else self.model_copy(update={"seed": secrets.randbelow(RANDOM_SEEDS)})


def derive_seed(job_seed: int, line: int, combination: int = 0) -> int:
    """The seed of a request that names none, below 2^53: the same for the same place in the same job, on every machine."""
    digest = hashlib.sha256(f"{job_seed}/{line}/{combination}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % RANDOM_SEEDS


def parse_size(text: str | None) -> str | dict[str, int] | None:
    """ "1024x768" -> width and height; a preset's name stays as it is."""
    if text is None:
        return None
    size = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.lower())
    return {"width": int(size[1]), "height": int(size[2])} if size else text


def make_request(variant: Variant, fields: dict[str, Any]) -> Request:
    """Validate ``fields`` for ``variant``.

    Raises:
        RequestError: naming every field that is wrong, what was given and what is allowed.
    """
    given = {k: v for k, v in fields.items() if v is not None}
    if variant != "standard":
        fixed = [name for name in STANDARD_ONLY if name in given]
        if fixed:
            raise RequestError(
                f"{' and '.join(fixed)} cannot be set on the {variant} variant, which fixes its own steps and "
                f"acceleration. Leave it out, or use the standard variant.",
                [{"loc": [name], "msg": f"not available on {variant}", "type": "extra_forbidden"} for name in fixed],
            )
    if isinstance(given.get("images"), (str, bytes, Path)) or hasattr(given.get("images"), "size"):
        given["images"] = (given["images"],)
    try:
        return Request(**given)
    except ValidationError as error:
        details = [
            {k: v for k, v in e.items() if k in ("loc", "msg", "type", "input", "ctx")}
            for e in error.errors(include_url=False)
        ]
        raise RequestError(explain(details, given), details) from None


def explain(details: list[dict[str, Any]], fields: dict[str, Any]) -> str:
    """pydantic's findings as one sentence per field, with what is allowed and what was given."""
    lines: dict[str, str] = {}
    for e in details:
        field = str(e["loc"][0]) if e["loc"] else "request"
        lines.setdefault(field, _explain_field(field, e, reprlib.repr(fields.get(field))))
    return " ".join(lines.values())


def _explain_field(field: str, e: dict[str, Any], given: str) -> str:
    if field == "image_size":
        if size := re.fullmatch(r"{'height': (\d+), 'width': (\d+)}", given):
            given = f"{size[2]}x{size[1]}"
        names = ", ".join(SIZES)
        return (
            f"image_size must be one of {names}, or a width and height from {MIN_SIDE} to {MAX_SIDE} pixels; "
            f"{given} is neither."
        )
    if e["type"] == "extra_forbidden":
        known = ", ".join(Request.model_fields)
        return f"{field} is not a field of the request; the fields are {known}."
    if e["type"] == "string_too_short":
        return EMPTY + "."
    if e["type"] == "literal_error":
        return f"{field} must be {e['ctx']['expected']}; {given} was given."
    if e["type"] in ("greater_than_equal", "less_than_equal"):
        allowed = [getattr(rule, name) for name in ("ge", "le") for rule in Request.model_fields[field].metadata
                   if hasattr(rule, name)]  # fmt: skip
        return f"{field} must be from {allowed[0]} to {allowed[1]}; {given} was given."
    if e["type"] == "missing":
        return f"{field} is missing; it is the only field that has no default."
    if e["type"] == "value_error":
        return str(e["ctx"]["error"]) + "." if "ctx" in e else f"{field}: {e['msg']}."
    return f"{field}: {e['msg'][0].lower()}{e['msg'][1:]}; {given} was given."
