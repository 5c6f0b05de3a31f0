"""What a user asks of a model, checked, and what follows from it: the hardware, the model's files and the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import load, quant, rates, store
from .attention import AUTO, NAMES
from .candidates import Need
from .costs import Work
from .errors import BudgetError, RequestError
from .hardware import Hardware, from_preset, probe, with_ram
from .lora import Lora
from .lora import load as lora_file
from .plan import Plan, Wishes, make_plan
from .presets import parse_bytes, tiers
from .request import ACCELERATIONS, VARIANTS, Acceleration, Variant
from .store import Checkpoint

LoraSource = str | Path | tuple[str | Path, float]
"""A LoRA: a file's path or "owner/name:file", alone or with its strength."""


@dataclass(frozen=True)
class Settings(Wishes):
    """What :meth:`Flux2.load` was asked for, checked.

    Attributes:
        variant, acceleration: of every request, unless a request names another acceleration.
        keep_prompts: whether prompts' embeddings are kept on disk.
    """

    variant: Variant = "standard"
    acceleration: Acceleration = "regular"
    keep_prompts: bool = False

    def plan(self, need: Need, hardware: Hardware) -> Plan:
        """How ``need`` is met within these settings.

        Raises:
            BackendUnavailableError: something insisted on cannot be used.
            BudgetError: nothing fits.
        """
        return make_plan(need, hardware, self)


def make_settings(
    variant: str = "standard",
    acceleration: str = "regular",
    *,
    vram: str | float | None = None,
    dtype: str | None = None,
    lora: LoraSource | list[LoraSource] | None = None,
    attention: str = AUTO,
    quantize: str = "auto",
    compile: bool | None = None,  # noqa: A002
    keep_prompts: bool = False,
    requests: int = 1,
) -> Settings:
    """Check the arguments of :meth:`Flux2.load` that have these names.

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
    if requests < 1:
        raise RequestError(f"requests must be at least 1; {requests} was given.")
    try:
        budget = None if vram is None else parse_bytes(vram)
    except ValueError as error:
        raise RequestError(f"vram: {error}") from None
    given = lora if isinstance(lora, list) else [] if lora is None else [lora]
    pairs = [a if isinstance(a, tuple) else (a, 1.0) for a in given]
    found = tuple(Lora(lora_file(source), float(strength)) for source, strength in pairs)
    return Settings(
        vram=budget,
        dtype=dtype,
        attention=attention,
        quantize=quantize,
        compiled=compile,
        requests=requests,
        variant=variant,  # type: ignore[arg-type]
        acceleration=acceleration,  # type: ignore[arg-type]
        adapters=found,
        keep_prompts=keep_prompts,
    )


def settings_of(loading: Mapping[str, Any]) -> Settings:
    """The settings that arguments of :meth:`Flux2.load` make, by name; without LoRAs, of which plans know nothing.

    Raises:
        RequestError: as :func:`make_settings`.
    """
    return make_settings(**{k: v for k, v in loading.items() if k not in ("model", "device", "base", "lora")})


def find_hardware(device: str | None, ram: int | None = None, measure: bool = False) -> Hardware:
    """This machine's hardware, whose rates may be measured for it, or the one that a preset of ``devices.toml`` describes; with
    ``ram`` bytes of host memory, to plan for that.

    Raises:
        PlanError: no such device.
        RequestError: ``ram`` for a device that has no memory but its own, which is the host's too.
    """
    described = device is not None and device.split(":")[0] not in ("cuda", "cpu", "mps")
    hardware = from_preset(device) if described else probe(device, measure)  # type: ignore[arg-type]
    if ram is None:
        return hardware
    if hardware.kind == "mps":
        raise RequestError(
            f"ram: {hardware.name} shares the host's memory. Write with --vram how much of it may be used."
        )
    return with_ram(hardware, ram)


def hardware_to_use(device: str | None, settings: Settings) -> Hardware:
    """As :func:`find_hardware`, for work rather than for a plan alone: rates that nobody has measured are measured where the budget
    has room for that."""
    small = settings.vram is not None and settings.vram < max(rates.ROOM.values())
    return find_hardware(device, measure=not small)


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
