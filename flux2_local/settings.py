"""What a user asks of a model, checked, and what follows from it: the hardware, the model's files and the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from . import load, lora, quant, store
from .attention import AUTO, NAMES
from .candidates import Need
from .costs import Work
from .errors import BudgetError, RequestError
from .hardware import Hardware, from_preset, probe
from .plan import Plan, make_plan
from .presets import parse_bytes, tiers
from .request import ACCELERATIONS, VARIANTS, Acceleration, Variant
from .store import Checkpoint

LoraSource = str | Path | tuple[str | Path, float]
"""A LoRA: a file's path or "owner/name:file", alone or with its strength."""


@dataclass(frozen=True)
class Settings:
    """What :meth:`Flux2.load` was asked for, checked.

    Attributes:
        variant, acceleration: of every request, unless a request names another acceleration.
        vram: bytes of device memory that may be used, or None.
        dtype: compute type insisted on, or None.
        adapters: the user's LoRAs.
        attention: "auto", or the attention backend insisted on.
        quantize: "auto", "none" or the format that the weights are to have.
        compiled: whether torch.compile is to be used, or None to leave it to the plan.
        keep_prompts: whether prompts' embeddings are kept on disk.
    """

    variant: Variant
    acceleration: Acceleration
    vram: int | None
    dtype: str | None
    adapters: tuple[lora.Lora, ...]
    attention: str = AUTO
    quantize: str = "auto"
    compiled: bool | None = None
    keep_prompts: bool = False

    def plan(self, need: Need, hardware: Hardware) -> Plan:
        """How ``need`` is met within these settings.

        Raises:
            BackendUnavailableError: something insisted on cannot be used.
            BudgetError: nothing fits.
        """
        return make_plan(need, hardware, self.vram, self.dtype, self.attention, self.quantize, self.compiled)


def make_settings(
    variant: str,
    acceleration: str,
    vram: str | int | None,
    dtype: str | None,
    adapters: LoraSource | list[LoraSource] | None,
    attention: str = AUTO,
    quantize: str = "auto",
    compiled: bool | None = None,
) -> Settings:
    """Check the arguments of :meth:`Flux2.load`.

    Raises:
        RequestError: naming the argument, what was given and what is allowed.
    """
    for name, value, allowed in (
        ("variant", variant, VARIANTS),
        ("acceleration", acceleration, ACCELERATIONS),
        ("dtype", dtype, (None, *load.DTYPES)),
        ("attention", attention, NAMES),
        ("quantize", quantize, quant.NAMES),
    ):
        if value not in allowed:
            words = ", ".join(str(a) for a in allowed if a is not None)
            raise RequestError(f"{name} must be one of {words}; {value!r} was given.")
    try:
        budget = None if vram is None else parse_bytes(vram)
    except ValueError as error:
        raise RequestError(f"vram: {error}") from None
    given = adapters if isinstance(adapters, list) else [] if adapters is None else [adapters]
    pairs = [a if isinstance(a, tuple) else (a, 1.0) for a in given]
    found = tuple(lora.Lora(lora.load(source), float(strength)) for source, strength in pairs)
    return Settings(variant, acceleration, budget, dtype, found, attention, quantize, compiled)  # type: ignore[arg-type]


def find_hardware(device: str | None, ram: int | None = None) -> Hardware:
    """This machine's hardware, or the one that a preset of ``devices.toml`` describes."""
    if device is not None and device.split(":")[0] not in ("cuda", "cpu", "mps"):
        return from_preset(device, ram)
    return probe(device)


def choose(
    model: str | Path | None, settings: Settings, hardware: Hardware, work: Work, base: str | Path | None = None
) -> tuple[Checkpoint, Plan]:
    """The model to use and its plan. With no model named, the best one on this disk that fits.

    Raises:
        ModelError, PlanError: as :meth:`Flux2.load`.
    """
    named = model is not None
    found = [store.find(model, settings.variant, base)] if named else list(store.candidates(settings.variant))
    refused: BudgetError | None = None
    for checkpoint in found:
        recipe = checkpoint.preset.recipe(settings.variant)
        need = Need(
            checkpoint.name,
            settings.variant,
            tiers()[settings.acceleration],
            load.architecture(checkpoint),
            replace(work, steps=recipe.steps),
        )
        try:
            return checkpoint, settings.plan(need, hardware)
        except BudgetError as error:
            refused = error
    assert refused is not None, "the bundled model is always a candidate"
    raise refused
