"""One denoising step of a random transformer: ours with the reference's and the plan's operations, and diffusers' own, all
with the same weights."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from benchmarks import synthetic
from flux2_local.latents import image_positions, text_positions
from flux2_local.model.ops import REFERENCE

TEXT = 64


@pytest.mark.parametrize("grid", [(16, 32), (64, 64)], ids=["512 tokens", "4096 tokens"])
@pytest.mark.parametrize("whose", ["ours, reference", "ours", "diffusers"])
def test_step(whose, grid, device, timed, benchmark):
    config = synthetic.small()
    dtype, ops = synthetic.fast(device, config)
    net = synthetic.transformer(config, REFERENCE if whose == "ours, reference" else ops, dtype, device)
    benchmark.extra_info["dtype"] = str(dtype)
    timed(stock(net, grid) if whose == "diffusers" else synthetic.step(net, grid, TEXT))


def stock(net, grid):
    """The same step by diffusers' transformer, everything that it computes in every step included."""
    names = ("num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim")
    theirs = Flux2Transformer2DModel(**{name: getattr(net.config, name) for name in names})
    theirs.load_state_dict(net.state_dict())
    theirs = theirs.to(net.x_embedder.weight.device, net.dtype).eval()
    like = {"device": net.x_embedder.weight.device, "dtype": net.dtype}
    inputs = {
        "hidden_states": torch.randn(1, grid[0] * grid[1], net.config.in_channels, **like),
        "encoder_hidden_states": torch.randn(1, TEXT, net.config.joint_attention_dim, **like),
        "timestep": torch.tensor([0.5], **like),
        "guidance": torch.tensor([4.0], **like),
        "img_ids": image_positions(*grid)[None].to(like["device"]),
        "txt_ids": text_positions(TEXT)[None].to(like["device"]),
    }

    @torch.inference_mode()
    def call():
        return theirs(**inputs, return_dict=False)[0]

    return call
