"""The tables of ``configs/`` as frozen values: models, variants, tiers, devices. The one place that reads them."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .errors import UnknownModelError
from .request import Acceleration, Variant

PACKAGE = Path(__file__).parent
BUNDLED = PACKAGE / "tiny"
"""Folder of the bundled model's weights."""

DISK_RATE = 3e9
"""Bytes/s of reading weights' files where nothing says more: an NVMe disk on four PCIe 3.0 lanes (3.9e9 in theory); assumed."""

EIGHT_BIT = {"int8": "int8_tops", "float8_e4m3fn": "fp8_tflops"}
"""8-bit types of matrix products, by torch's name, and their rates in ``devices.toml``."""

Guidance = Literal["embedded", "cfg", "none"]


@dataclass(frozen=True)
class Recipe:
    """How a model serves a variant.

    Attributes:
        steps: default number of denoising steps; the fixed one on turbo and flash.
        schedule: "dynamic" (the pipelines' own shift) or "shift" (a constant one).
        shift: of a constant schedule.
        published: noise levels that the recipe's authors publish for one number of image tokens, or None.
        lora: file in the model's folder, "owner/name:file" on the hub, or None.
        note: something the user should know, or "".
    """

    steps: int
    schedule: Literal["dynamic", "shift"]
    shift: float = 1.0
    published: tuple[int, tuple[float, ...]] | None = None
    lora: str | None = None
    note: str = ""


@dataclass(frozen=True)
class ModelPreset:
    """One model of ``models.toml``; the attributes are explained there.

    ``variants`` maps a variant to its recipe; a variant that is not in it is not served.
    """

    name: str
    title: str
    pipeline: str
    family: str
    guidance: Guidance
    text_layers: tuple[int, ...]
    text_tokens: int
    licence: str
    gated: bool
    variants: dict[Variant, Recipe]
    hub: str | None = None
    harmless: str | None = None
    references_once: bool = False

    def recipe(self, variant: Variant) -> Recipe:
        """The recipe for ``variant``.

        Raises:
            UnknownModelError: this model does not serve it.
        """
        if variant not in self.variants:
            served = ", ".join(self.variants)
            others = ", ".join(m.name for m in models().values() if variant in m.variants)
            raise UnknownModelError(
                f"{self.name} does not serve the {variant} variant (it serves {served}). Models that do: {others}."
            )
        return self.variants[variant]


@dataclass(frozen=True)
class VariantInfo:
    """One variant of ``variants.toml``."""

    name: Variant
    title: str
    endpoint: str
    description: str


@dataclass(frozen=True)
class CachePolicy:
    """When a denoising step may be skipped (:mod:`flux2_local.cache`).

    Attributes:
        threshold: largest relative change of what the first block adds, mean |difference| over mean |value|; infinity skips
            whatever the other three permit, the first block included.
        warmup: steps at the beginning that are always computed.
        tail: steps at the end that are always computed.
        limit: most steps skipped in a row.
        steps: of the pictures that it was calibrated on.
        expected: with a finite threshold, the share of all steps that is skipped in a picture on the average.
        measured: whether ``scripts/calibrate_cache.py`` found the row on this model; else it follows published figures.
    """

    threshold: float
    warmup: int
    tail: int
    limit: int
    steps: int = 28
    expected: float = 0.0
    measured: bool = True

    def skipped(self, steps: int) -> float:
        """Of so many steps, those that are expected to be skipped; exact where their numbers alone decide."""
        free = max(0, steps - self.tail - self.warmup)
        most = free - free // (self.limit + 1)
        return most if self.threshold == math.inf else min(most, self.expected * steps)

    def at(self, steps: int) -> CachePolicy:
        """The policy for pictures of ``steps`` steps: fewer lie farther apart, and fewer in a row can be skipped."""
        return replace(self, limit=max(1, self.limit * steps // self.steps), steps=steps)


@dataclass(frozen=True)
class Tier:
    """One tier of ``tiers.toml``: what it permits. ``cache`` maps a model to its step-cache policy; ``quantize``
    permits formats that are faster than 16 bit even where memory does not call for them. ``loss`` and ``patience`` weigh
    a format's loss against the seconds that it saves (:func:`flux2_local.plan.prefer`)."""

    name: Acceleration
    description: str
    exact: bool
    dtypes: dict[str, tuple[str, ...]]
    cache: dict[str, CachePolicy]
    quantize: bool
    loss: float
    patience: float


@dataclass(frozen=True)
class DevicePreset:
    """One device of ``devices.toml``. Rates in FLOP/s and bytes/s, memory in bytes.

    Attributes:
        flops: of products in 16 bit (float32 on a CPU).
        eight_bit: of products of 8-bit types, by torch's name, as multiples of ``flops``.
        source: where the rates are from.
    """

    name: str
    title: str
    kind: Literal["cuda", "cpu", "mps"]
    memory: int
    flops: float
    memory_rate: float
    link_rate: float
    sm: int | None = None
    eight_bit: dict[str, float] = field(default_factory=dict)
    disk_rate: float = DISK_RATE
    source: str = ""


def config_folder() -> Path:
    """``configs/`` of the installed package, or of the source checkout."""
    installed = PACKAGE / "configs"
    return installed if installed.is_dir() else PACKAGE.parent / "configs"


@cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads((config_folder() / f"{name}.toml").read_text("utf-8"))


def _recipe(row: dict[str, Any]) -> Recipe:
    published = row.get("published")
    return Recipe(
        steps=row["steps"],
        schedule=row["schedule"],
        shift=row.get("shift", 1.0),
        published=(published["tokens"], tuple(published["sigmas"])) if published else None,
        lora=row.get("lora"),
        note=row.get("note", ""),
    )


@cache
def models() -> dict[str, ModelPreset]:
    """Every known model by name, best first."""
    return {
        name: ModelPreset(
            name=name,
            title=row["title"],
            pipeline=row["pipeline"],
            family=row["family"],
            guidance=row["guidance"],
            text_layers=tuple(row["text"]["layers"]),
            text_tokens=row["text"]["tokens"],
            licence=row["licence"],
            gated=row["gated"],
            variants={k: _recipe(v) for k, v in row["variants"].items()},
            hub=row.get("hub"),
            harmless=row.get("harmless"),
            references_once=row.get("references_once", False),
        )
        for name, row in _table("models").items()
    }


@cache
def variants() -> dict[Variant, VariantInfo]:
    """The three variants by name."""
    return {name: VariantInfo(name, **row) for name, row in _table("variants").items()}  # type: ignore[misc, arg-type]


@cache
def tiers() -> dict[Acceleration, Tier]:
    """The acceleration tiers by name."""
    return {
        name: Tier(  # type: ignore[misc]
            name=name,  # type: ignore[arg-type]
            description=row["description"],
            exact=row["exact"],
            dtypes={k: tuple(v) for k, v in row["dtypes"].items()},
            cache={k: CachePolicy(**v) for k, v in row.get("cache", {}).items()},
            quantize=row.get("quantize", False),
            loss=row["loss"],
            patience=row["patience"],
        )
        for name, row in _table("tiers").items()
    }


def _eight_bit(row: dict[str, Any]) -> dict[str, float]:
    reached = row["tflops"] * row["efficiency"]
    return {
        name: row[key] * row[f"{key.split('_')[0]}_efficiency"] / reached
        for name, key in EIGHT_BIT.items()
        if key in row
    }


@cache
def devices() -> dict[str, DevicePreset]:
    """Public figures of common devices by name."""
    return {
        name: DevicePreset(
            name=name,
            title=row["title"],
            kind=row["kind"],
            memory=parse_bytes(row["memory"]),
            flops=row["tflops"] * 1e12 * row["efficiency"],
            memory_rate=row["memory_gbs"] * 1e9,
            link_rate=row["link_gbs"] * 1e9,
            sm=row.get("sm"),
            eight_bit=_eight_bit(row),
            disk_rate=row.get("disk_gbs", DISK_RATE / 1e9) * 1e9,
            source=row["source"],
        )
        for name, row in _table("devices").items()
    }


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgt")}
_UNITS |= {f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgt")}


def parse_bytes(text: str | float) -> int:
    """Bytes from a number or from text such as "12GiB", "24 GB" or "800MB".

    Raises:
        ValueError: not such a text, or no byte.
    """
    if isinstance(text, (int, float)):
        text = f"{text:.0f}"
    digits = text.strip().lower().rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = text.strip().lower()[len(digits) :].strip()
    if unit not in _UNITS or not digits.replace(".", "", 1).isdigit():
        raise ValueError(f"{text!r} is not an amount of memory; write for example 12GiB or 24GB.")
    count = int(float(digits) * _UNITS[unit])
    if not count:
        raise ValueError(f"{text!r} is no memory at all; write for example 12GiB or 24GB.")
    return count


def show_bytes(count: float) -> str:
    """Bytes for people: "7.4 GiB", "31 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


@cache
def families() -> dict[str, dict[str, dict[str, Any]]]:
    """Configurations of the published families: family -> component -> the fields of its config.json."""
    return dict(_table("families"))


@cache
def quantization() -> dict[str, dict[str, Any]]:
    """Rows of ``quantization.toml``: format -> threshold, and the layers kept per model and network."""
    return dict(_table("quantization"))
