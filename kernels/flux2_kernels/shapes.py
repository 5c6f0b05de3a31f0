"""The sizes at which the FLUX.2 models call the ops: one place, for cases, benchmarks and rooflines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Width, heads and MLP width of one transformer; every head has 128 channels."""

    width: int
    heads: int

    @property
    def mlp(self) -> int:
        return 3 * self.width

    @property
    def packed(self) -> int:
        """Width of a single block's input projection: q, k, v, MLP gate and MLP up."""
        return 3 * self.width + 2 * self.mlp

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The large linears as (n, k): single blocks' two, then double blocks' attention and MLP."""
        return {
            "single-in": (self.packed, self.width),
            "single-out": (self.width, self.width + self.mlp),
            "attention": (self.width, self.width),
            "mlp-in": (2 * self.mlp, self.width),
            "mlp-out": (self.width, self.mlp),
        }


MODELS = {"dev": Model(6144, 48), "klein-4b": Model(3072, 24), "klein-9b": Model(4096, 32)}
HEAD_DIM = 128
TOKENS = 4096 + 512  # 1024 x 1024 pixels and the text
