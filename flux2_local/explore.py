"""What could run here or elsewhere: plans for machines and models that are not at hand, what is on this disk, and a
diagnosis of the installation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import attention, load, rates, safety, store
from .candidates import Need
from .costs import CHAT, Architecture, Work
from .errors import BudgetError, Flux2Error, PlanError, WeightsMissingError
from .hardware import Hardware, cpu_flags, package, probe
from .images import reference_size
from .model.autoencoder import AutoencoderConfig
from .model.language import LanguageConfig
from .model.transformer import TransformerConfig
from .plan import Plan, make_plan
from .presets import ModelPreset, families, models, show_bytes, tiers
from .quant import FORMATS
from .settings import Settings, choose, find_hardware

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .request import Request, Variant

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "peft", "triton")
BACKENDS = (  # distribution, the device that it needs, what it is for
    ("triton", "cuda", "fused kernels"),
    ("torchao", "", "quantization"),
    ("optimum-quanto", "", "quantization"),
    ("nudenet", "", "safety check without a download"),
)


def family_architecture(preset: ModelPreset) -> Architecture:
    """The shapes of a published model that need not be on this disk.

    Raises:
        KeyError: the preset's family is not in ``families.toml``.
    """
    shapes = families()[preset.family]
    return Architecture(
        transformer=TransformerConfig.from_dict(shapes["transformer"]),
        language=LanguageConfig.from_dict(shapes["text_encoder"]),
        autoencoder=AutoencoderConfig.from_dict(shapes["vae"]),
        text_layers=preset.text_layers,
        text_tokens=preset.text_tokens,
        passes=2 if preset.guidance == "cfg" else 1,
        references_once=preset.references_once,
    )


def plan_for(
    model: str | Path | None,
    settings: Settings,
    request: Request,
    device: str | None,
    ram: int | None,
    references: Iterable[tuple[int, int]] = (),
    base: str | Path | None = None,
) -> Plan:
    """The plan for a request, on this machine or a known card, whether or not the model is on this disk.

    Args:
        model, settings, request, device, base: as loading and generating take them.
        ram: bytes of host memory to plan with.
        references: width and height in pixels of the request's reference pictures.

    Raises:
        ModelError, PlanError, RequestError: as loading would.
    """
    hardware = find_hardware(device, ram)
    width, height = request.size
    try:
        checkpoint, _ = choose(model, settings, hardware, Work(width, height), base)
        preset, name, arch = checkpoint.preset, checkpoint.name, load.architecture(checkpoint)
    except WeightsMissingError:
        preset = next((m for m in models().values() if str(model) in (m.name, m.hub)), None)  # type: ignore[assignment]
        if preset is None:
            raise
        name, arch = preset.name, family_architecture(preset)
    steps = request.num_inference_steps or preset.recipe(settings.variant).steps
    chat = CHAT if request.enable_prompt_expansion else 0
    sizes = tuple(reference_size(*size, arch.multiple) for size in references)
    work = Work(width, height, steps, request.num_images, references=sizes, chat=chat)
    need = Need(name, settings.variant, tiers()[settings.acceleration], arch, work)
    return settings.plan(need, hardware)


@dataclass(frozen=True)
class ModelState:
    """One known model: whether its weights are here, and whether this machine can run it."""

    preset: ModelPreset
    state: str
    fits: str

    def to_dict(self) -> dict[str, Any]:
        p = self.preset
        return {
            "name": p.name,
            "title": p.title,
            "hub": p.hub,
            "licence": p.licence,
            "variants": list(p.variants),
            "state": self.state,
            "fits": self.fits,
        }


def survey() -> list[ModelState]:
    """Every known model, best first."""
    hardware = probe()
    return [ModelState(preset, disk_state(preset), fit(preset, hardware)) for preset in models().values()]


def disk_state(preset: ModelPreset) -> str:
    """Whether a model's weights are on this disk."""
    variant = next(iter(preset.variants))
    try:
        checkpoint = store.find(preset.name, variant)
    except WeightsMissingError:
        return "not here" + (", gated" if preset.gated else "")
    except Flux2Error as error:
        return f"damaged: {str(error)[:40]}…"
    missing = [v for v in preset.variants if preset.variants[v].lora and store.recipe_lora(checkpoint, v) is None]
    size = sum(f.stat().st_size for f in checkpoint.folder.rglob("*.safetensors"))
    lacking = f", without the {'/'.join(missing)} LoRA" if missing else ""
    return f"here, {show_bytes(size)}{lacking}"


def fit(preset: ModelPreset, hardware: Hardware) -> str:
    """Whether and how a model fits this machine."""
    variant: Variant = next(iter(preset.variants))
    arch = family_architecture(preset) if preset.family in families() else None
    if arch is None:
        try:
            arch = load.architecture(store.find(preset.name, variant))
        except Flux2Error:
            return ""
    need = Need(preset.name, variant, tiers()["regular"], arch, Work(steps=preset.variants[variant].steps))
    try:
        plan = make_plan(need, hardware)
    except BudgetError as error:
        return f"does not fit: needs {show_bytes(error.smallest)}, {show_bytes(hardware.free)} free"
    how = f"{plan.transformer.format}, {plan.transformer.placement}, peak {show_bytes(plan.peak_bytes)}"
    return f"fits: {how}, about {plan.seconds:.0f} s a picture"


def diagnosis(measure: bool = False) -> dict[str, dict[str, str]]:
    """Hardware, versions and backends, each with its state: what ``flux2-local doctor`` prints.

    Args:
        measure: time the device, and keep its rates for plans to come.
    """
    try:
        hardware = rates.keep(probe()) if measure else probe()
    except PlanError as error:
        return {"hardware": {"problem": str(error)}}
    versions = {name: package(name).version or "not installed" for name in ("flux2-local", *PACKAGES)}
    backends = attention_rows(hardware)
    for name, need, purpose in BACKENDS:
        found = package(name, on=hardware.kind, need=need)
        state = f"usable, {found.version}" if found.usable else f"not usable: {found.problem}"
        backends[name] = f"{state} ({purpose})"
    dtype = hardware.fast_dtypes[0]
    formats = {f.name: f.reason_against(hardware, dtype) or f"usable with {dtype}" for f in FORMATS.values()}
    return {
        "hardware": hardware_rows(hardware),
        "versions": versions,
        "backends": backends,
        "weight formats": formats,
        "safety check": {"classifier": safety.available() or "none; see `flux2-local download`"},
        "models": {"hub cache": str(hub_cache()), "offline": os.environ.get("HF_HUB_OFFLINE", "0")},
    }


def attention_rows(hardware: Hardware) -> dict[str, str]:
    """Each attention backend with whether the high tier could use it here for FLUX.2's heads, or why not."""
    problem = attention.problem_on(hardware, hardware.fast_dtypes[0], 4608, 24, 128)
    against = {name: b.reason_against(problem, tiers()["high"]) for name, b in attention.BACKENDS.items()}
    return {name: f"{f'not usable: {why}' if why else 'usable'} (attention)" for name, why in against.items()}


def hardware_rows(hardware: Hardware) -> dict[str, str]:
    source = "measured" if hardware.measured else "public figures; --measure times them here"
    products = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in hardware.flops.items())
    if not hardware.measured and hardware.source:
        source += f"; source: {hardware.source}"
    rows = {
        "device": f"{hardware.device}: {hardware.name}",
        "memory": f"{show_bytes(hardware.memory)}, {show_bytes(hardware.free)} free",
        "host memory": f"{show_bytes(hardware.ram)} available, {hardware.cores} cores",
        "matrix products": f"{products} ({source})",
        "memory rate": f"{hardware.memory_rate / 1e9:.3g} GB/s ({source})",
    }
    if hardware.kind == "cuda":
        rows["link"] = f"{hardware.link_rate / 1e9:.3g} GB/s from the host ({source})"
    if hardware.sm:
        rows["compute capability"] = f"{hardware.sm / 10:.1f}"
    if hardware.kind == "cpu":
        wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
        rows["instructions"] = ", ".join(f for f in wanted if f in cpu_flags()) or "none of the fast ones"
    return rows


def hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
