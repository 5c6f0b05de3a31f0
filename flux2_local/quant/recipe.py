"""How a network is quantized: the format, and the layers that stay in the compute type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..presets import quantization
from .formats import FORMATS, Format

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Recipe:
    """One network's quantization.

    Attributes:
        format: a key of :data:`~flux2_local.quant.formats.FORMATS`.
        threshold: relative output error above which a layer is kept (:func:`flux2_local.quant.measure.errors`).
        keep: names of block layers that stay in the compute type; what is not in a block always does.
    """

    format: str
    threshold: float = 1.0
    keep: tuple[str, ...] = ()

    @property
    def form(self) -> Format:
        """What the format is."""
        return FORMATS[self.format]

    def layers(self, network: nn.Module) -> dict[str, nn.Linear]:
        """The layers of ``network`` that are quantized, by name."""
        from ..model.blocks import block_linears

        group = self.form.group or 1
        return {
            name: layer
            for name, layer in block_linears(network).items()
            if name not in self.keep and layer.in_features % group == 0
        }

    def keeping(self, errors: Mapping[str, float]) -> Recipe:
        """This recipe, with the layers whose measured error is above the threshold kept."""
        worst = tuple(sorted(name for name, error in errors.items() if error > self.threshold))
        return replace(self, keep=worst)

    def to_dict(self) -> dict[str, Any]:
        """What decides how weights come out, for naming what is kept on disk."""
        return {"format": self.format, "keep": self.keep, "group": self.form.group, "rotation": self.form.rotation}


def recipe_for(form: Format, model: str, component: str) -> Recipe:
    """The recipe of ``configs/quantization.toml`` for a format, with what was calibrated for ``model``'s ``component``."""
    row = quantization().get(form.name, {})
    keep = row.get("keep", {}).get(model, {}).get(component, ())
    return Recipe(form.name, row.get("threshold", 1.0), tuple(keep))
