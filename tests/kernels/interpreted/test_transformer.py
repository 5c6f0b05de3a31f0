"""The whole denoiser on the table of Triton kernels, against the reference table on the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flux2_kernels import KernelUnavailable
from flux2_kernels.verify import poisoned
from torch import Tensor

from flux2_local.model.kernels import NEEDED, fused
from flux2_local.model.ops import REFERENCE, Ops
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig

CONFIG = TransformerConfig(
    num_layers=1,
    num_single_layers=2,
    num_attention_heads=3,
    attention_head_dim=16,
    in_channels=8,
    joint_attention_dim=24,
    timestep_guidance_channels=16,
    axes_dims_rope=(4, 4, 4, 4),
)
TEXT, IMAGE = 3, 7
CPU = torch.device("cpu")


def model(dtype: torch.dtype) -> Flux2Transformer:
    net = Flux2Transformer(CONFIG)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0, 1.2 / p.shape[1] ** 0.5, generator=generator)
    return net.to(dtype).eval()


def forward(net: Flux2Transformer, ops: Ops, batch: int) -> Tensor:
    """One evaluation, float32; the prompt and the modulation are shared by the batch, as the sampler shares them.

    Inputs, timestep and guidance are numbers that every dtype holds exactly, so that only what is computed rounds.
    """
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, IMAGE, CONFIG.in_channels, generator=generator).bfloat16().to(net.dtype)
    text = torch.randn(1, TEXT, CONFIG.joint_attention_dim, generator=generator).bfloat16().to(net.dtype)
    ids = torch.randint(0, 9, (TEXT + IMAGE, 4), generator=generator)
    net.ops = ops
    with torch.inference_mode():
        mod = net.modulation(torch.tensor(0.125), 2.0)
        context = net.context(text).expand(batch, -1, -1)
        with poisoned():
            return net(latents, context, mod, net.rotary(ids), IMAGE - 2).float()


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 1)])
def test_forward_is_the_reference_but_for_rounding(dtype: torch.dtype, batch: int, launches: list[Any]) -> None:
    """In 16 bits, about as far from the float32 result of the same weights as the reference is."""
    net = model(dtype)
    plain = forward(net, REFERENCE, batch)
    assert not launches
    ours = forward(net, fused(CPU, dtype, CONFIG), batch)
    assert len(launches) == CONFIG.num_layers * 14 + CONFIG.num_single_layers * 5
    size = plain.norm()
    if dtype == torch.float32:
        assert (ours - plain).norm() <= 1e-5 * size
        return
    exact = forward(net.float(), REFERENCE, batch)
    theirs = (plain - exact).norm()
    assert (ours - exact).norm() <= 1.25 * theirs and theirs < 0.05 * size


def test_every_operation_of_the_table_is_a_kernel() -> None:
    ops = fused(CPU, torch.bfloat16, CONFIG)
    for name in ("modulated_norm", "gated_residual", "qk_norm_rope", "swiglu"):
        assert getattr(ops, name) is not getattr(REFERENCE, name)
    assert ops.attend is REFERENCE.attend and len(NEEDED) == 4


def test_heads_that_the_kernels_do_not_take() -> None:
    with pytest.raises(KernelUnavailable, match="power of two"):
        fused(CPU, torch.bfloat16, replace(CONFIG, attention_head_dim=24))
