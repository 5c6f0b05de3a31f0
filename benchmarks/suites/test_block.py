"""One block of each kind, random weights, at the scaled-down family's width and klein-4B's."""

import pytest
import torch

from benchmarks import synthetic
from flux2_local.explore import family_architecture
from flux2_local.latents import image_positions, text_positions
from flux2_local.model.transformer import Turn, entered
from flux2_local.presets import models

GRID, TEXT = (32, 32), 512


@pytest.mark.parametrize("model", ["small", "klein-4b"])
@pytest.mark.parametrize("kind", ["double", "single"])
@torch.inference_mode()
def test_block(kind, model, device, timed):
    config = synthetic.small() if model == "small" else family_architecture(models()[model]).transformer
    dtype, ops = synthetic.fast(device, config)
    one = synthetic.with_blocks(config, double=int(kind == "double"), single=int(kind == "single"))
    net = synthetic.transformer(one, ops, dtype, device)
    rotary = net.rotary(torch.cat([text_positions(TEXT), image_positions(*GRID)]).to(device))
    mod = net.modulation(torch.tensor(0.5, device=device), 4.0 if config.guidance_embeds else None)
    image, text = (torch.randn(1, n, config.width, device=device).to(dtype) for n in (GRID[0] * GRID[1], TEXT))
    block = (net.transformer_blocks if kind == "double" else net.single_transformer_blocks)[0]
    entries = block.entries(mod)
    if kind == "double":
        streams = [entered(x, entry, ops) for x, entry in zip((image, text), entries, strict=True)]
        timed(lambda: block(*streams, mod, rotary, ops, Turn(entries)))
    else:
        both = entered(torch.cat([text, image], 1), *entries, ops)
        timed(lambda: block(both, mod, rotary, ops, Turn(entries)))
