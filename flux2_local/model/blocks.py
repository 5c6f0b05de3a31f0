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


SCHEDULE = (
    "time_guidance_embed",
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
    "norm_out",
)
"""Parts of the transformer that only :meth:`Flux2Transformer.modulation` uses, in the order of their use."""


def repeated(network: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer or a language model, in the order that they are called."""
    lists = (getattr(network, name.rstrip("."), ()) for name in BLOCKS)
    return [block for blocks in lists for block in blocks]
