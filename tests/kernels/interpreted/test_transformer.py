"""The whole denoiser on the table of Triton kernels, against the reference table on the same weights, dense and quantized."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from flux2_kernels import Format, KernelUnavailable, choose, linear_w8a8, quantize_rows
from flux2_kernels.verify import poisoned
from torch import Tensor

from flux2_local.model.kernels import fused
from flux2_local.model.ops import REFERENCE, Ops
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig
from flux2_local.quant import FORMATS, Recipe, builtin

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


def model(dtype: torch.dtype, config: TransformerConfig = CONFIG) -> Flux2Transformer:
    net = Flux2Transformer(config)
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


def quantized(net: Flux2Transformer, name: str, kernels: bool) -> Flux2Transformer:
    """A copy with int8, fp8 or int4 blocks, whose layers run as Triton kernels or as the reference."""
    form, made = FORMATS[name], copy.deepcopy(net)
    kind = builtin.values_of(form)
    for layer_name, layer in Recipe(name).layers(made).items():
        ours = builtin.quantize(layer.weight.detach(), form, net.dtype, CPU)
        assert isinstance(ours, builtin.QuantizedLinear)
        made.set_submodule(layer_name, ours)
        if ours.quantizer is None:
            way = "triton" if kernels else "reference"
            product = choose("linear_w4a16", CPU, Format(net.dtype), implementation=way).function
            ours.arithmetic = replace(ours.arithmetic, product=product)
            continue
        product = choose("linear_w8a8", CPU, Format(net.dtype, kind), implementation="triton").function
        if not kernels:
            product = linear_w8a8.reference
        quantizer = replace(ours.quantizer, **({} if kernels else {"function": quantize_rows.reference}))
        ours.arithmetic = replace(ours.arithmetic, product=product, quantizer=quantizer)
    return made


def names(launches: list[Any]) -> Counter[str]:
    """How often each kernel was launched."""
    return Counter(launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches)


def per_model(double: dict[str, int], single: dict[str, int]) -> Counter[str]:
    """The launches of a step, from a block's; two norms stand before the first block, and none behind the last."""
    found = Counter({"modulated_norm": 2})
    for kernel in (*double, *single):
        found[kernel] = double.get(kernel, 0) * CONFIG.num_layers + single.get(kernel, 0) * CONFIG.num_single_layers
    return found


DENSE = (
    {"gated_residual_norm": 4, "qk_norm_rope": 2, "swiglu": 2},
    {"gated_residual_norm": 1, "qk_norm_rope": 1, "swiglu": 1},
)
"""Of a double and of a single block. Norm and residual apart, q and k apart, they were 14 and 5."""

W8A8 = (
    {"gated_residual_norm": 4, "qk_norm_rope": 2, "swiglu_quantized": 2, "linear_w8a8": 12, "quantize_rows": 2},
    {"gated_residual_norm": 1, "qk_norm_rope": 1, "swiglu_quantized": 1, "linear_w8a8": 2},
)
"""Only the result of a double block's attention is quantized in a pass of its own; layer by layer they were 12 and 2."""


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 2), (torch.bfloat16, 2), (torch.float16, 1)])
def test_forward_is_the_reference_but_for_rounding(dtype: torch.dtype, batch: int, launches: list[Any]) -> None:
    """In 16 bits, about as far from the float32 result of the same weights as the reference is."""
    net = model(dtype)
    plain = forward(net, REFERENCE, batch)
    assert not launches
    ours = forward(net, fused(CPU, dtype, CONFIG), batch)
    assert names(launches) == per_model(*DENSE)
    size = plain.norm()
    if dtype == torch.float32:
        assert (ours - plain).norm() <= 1e-5 * size
        return
    exact = forward(net.float(), REFERENCE, batch)
    theirs = (plain - exact).norm()
    assert (ours - exact).norm() <= 1.25 * theirs and theirs < 0.05 * size


@pytest.mark.parametrize("name", ["builtin-int8", "builtin-fp8", "builtin-int8-rotated"])
def test_quantized_rows_come_out_of_the_kernels_before(name: str, launches: list[Any]) -> None:
    """About as far from the dense float32 result as the reference on the same weights, which quantizes what was rounded."""
    net = model(torch.bfloat16)
    exact = forward(copy.deepcopy(net).float(), REFERENCE, 2)
    plain = forward(quantized(net, name, kernels=False), REFERENCE, 2)
    assert not launches
    ours = forward(quantized(net, name, kernels=True), fused(CPU, torch.bfloat16, CONFIG), 2)
    theirs = (plain - exact).norm()
    assert (ours - exact).norm() <= 1.25 * theirs and theirs < 0.25 * exact.norm()
    if name.endswith("rotated"):  # which no other kernel does on its way; but layers of one input share its rows
        assert names(launches)["swiglu_quantized"] == 0
        assert sum(n for kernel, n in names(launches).items() if kernel.startswith("quantize")) == 8 + 2 * 2 + 1
    else:
        assert names(launches) == per_model(*W8A8)


def test_int4_weights_take_rows_as_attention_leaves_them(launches: list[Any]) -> None:
    """Text's and image's parts of a batch, which nothing quantizes, and so copies, on the way."""
    config = replace(CONFIG, num_attention_heads=8, num_single_layers=1)
    net = model(torch.bfloat16, config)
    plain = forward(quantized(net, "builtin-int4", kernels=False), REFERENCE, 2)
    ours = forward(quantized(net, "builtin-int4", kernels=True), REFERENCE, 2)
    assert names(launches) == {"linear_w4": 12 + 2} and (ours - plain).norm() <= 0.02 * plain.norm()


@pytest.mark.parametrize("name", ["", "builtin-int8"])
def test_blocks_trace_in_one_graph(name: str, launches: list[Any]) -> None:
    net, ops = model(torch.bfloat16), fused(CPU, torch.bfloat16, CONFIG)
    net = quantized(net, name, kernels=True) if name else net
    wanted = forward(net, ops, 2)
    eager = names(launches)
    launches.clear()
    for block in (*net.transformer_blocks, *net.single_transformer_blocks):
        block.forward = torch.compile(block.forward, backend="aot_eager", dynamic=True, fullgraph=True)
    assert torch.equal(forward(net, ops, 2), wanted)
    assert names(launches) == eager


def test_every_operation_of_the_table_is_a_kernel() -> None:
    ops = fused(CPU, torch.bfloat16, CONFIG)
    for name in ("modulated_norm", "residual_norm", "qk_norm_rope", "swiglu", "swiglu_rows"):
        assert getattr(ops, name) is not getattr(REFERENCE, name)
    assert ops.attend is REFERENCE.attend


def test_heads_that_the_kernels_do_not_take() -> None:
    with pytest.raises(KernelUnavailable, match="power of two"):
        fused(CPU, torch.bfloat16, replace(CONFIG, attention_head_dim=24))
