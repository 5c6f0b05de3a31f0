"""Where nearly all weights are: the linear layers inside the repeated blocks of a transformer or a language model."""

from __future__ import annotations

from torch import nn

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.", "layers.")


def block_linears(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of ``network``'s blocks by name.

    What lies outside the blocks (embedders, modulations, the output projection) is small and acts on every token at once, so
    it is never quantized; the autoencoder has no blocks of this kind.
    """
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(BLOCKS)
    }
