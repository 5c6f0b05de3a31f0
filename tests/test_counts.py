"""The regression gate: what a denoising step does, counted and not timed, so that a noisy machine changes nothing."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flux2_local.attention import matmul
from flux2_local.bench.counts import Counts, count
from flux2_local.model.native import NATIVE
from flux2_local.model.ops import REFERENCE, Ops
from flux2_local.model.transformer import Flux2Transformer, TransformerConfig
from flux2_local.quant import FORMATS, Recipe, builtin
from flux2_local.quant.convert import convert

SHAPE = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 32,
    "joint_attention_dim": 96,
    "timestep_guidance_channels": 64,
    "axes_dims_rope": (8, 8, 8, 8),
}
IMAGE, TEXT = 64, 16


@dataclass(frozen=True)
class Stack:
    """One way to compute a step, and about one percent above what is counted of it now; arithmetic has no margin.

    FLOPs are those that torch's counter has formulas for, of which int8's products are none.
    """

    ops: Ops
    dtype: torch.dtype
    bound: Counts
    quantize: str = ""


REAL = replace(NATIVE, attend=matmul.load())
"""What a CPU's 16-bit tiers run."""

STACKS = {
    "reference": Stack(
        REFERENCE, torch.float32, Counts(operations=368, moved=31_600_000, allocations=335, allocated=8_600_000, flops=171_442_176)
    ),
    "16 bit": Stack(
        REAL, torch.bfloat16, Counts(operations=316, moved=18_420_000, allocations=214, allocated=4_095_000, flops=187_826_176)
    ),
    "int8": Stack(
        REAL,
        torch.bfloat16,
        Counts(operations=646, moved=47_370_000, allocations=511, allocated=15_440_000, flops=17_432_576),
        "builtin-int8",
    ),
}  # fmt: skip
"""Lower a bound when a step does less."""


def step(stack=STACKS["reference"]):
    """A function that computes one step of a small random transformer, everything that steps share computed before."""
    torch.manual_seed(0)
    net = Flux2Transformer(TransformerConfig(**SHAPE), stack.ops).eval().requires_grad_(False).to(stack.dtype)
    if stack.quantize:
        convert(net, Recipe(stack.quantize), stack.dtype, torch.device("cpu"))
    mod = net.modulation(torch.tensor(0.5), 2.5)
    rotary = net.rotary(torch.zeros(TEXT + IMAGE, 4))
    latents, context = torch.randn(1, IMAGE, 32), net.context(torch.randn(1, TEXT, 96, dtype=stack.dtype))
    return net, (latents.to(stack.dtype), context, mod, rotary, IMAGE)


def ours(stack=STACKS["reference"]) -> Counts:
    net, inputs = step(stack)
    return count(lambda: net(*inputs))


def theirs() -> Counts:
    net = Flux2Transformer2DModel(**SHAPE).eval().requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, IMAGE, 32),
        "encoder_hidden_states": torch.randn(1, TEXT, 96),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([2.5]),
        "img_ids": torch.zeros(1, IMAGE, 4),
        "txt_ids": torch.zeros(1, TEXT, 4),
    }
    return count(lambda: net(**inputs))


def within(got: Counts, bound: Counts) -> bool:
    return all(getattr(got, name) <= getattr(bound, name) for name in Counts.__dataclass_fields__)


@pytest.mark.parametrize("name", STACKS)
def test_a_step_stays_within_its_bounds(name):
    found = ours(STACKS[name])
    assert within(found, STACKS[name].bound), found


def test_16_bit_on_a_cpu_moves_less_than_the_reference():
    found, reference = ours(STACKS["16 bit"]), ours()
    assert found.operations < reference.operations and found.allocated < reference.allocated / 2


def test_a_step_does_less_than_the_stock_transformer():
    mine, stock = ours(), theirs()
    assert mine.operations < stock.operations and mine.moved < stock.moved and mine.allocated < stock.allocated
    assert mine.flops < stock.flops


def norm_twice_cast(x, shift, scale, into=None):
    y = REFERENCE.modulated_norm(x, shift, scale).double().to(x.dtype)
    return y if into is None else into(y)


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize(
    "waste",
    [
        {"residual_norm": lambda x, gate, y, *a: REFERENCE.residual_norm(x.clone(), gate, y, *a)},
        {"modulated_norm": norm_twice_cast},
        {"attend": lambda q, k, v, out: REFERENCE.attend(q, k, v, out).add_(0 * REFERENCE.attend(q, k, v))},
    ],
)
def test_waste_does_not_pass(waste, name):
    stack = STACKS[name]
    assert not within(ours(replace(stack, ops=replace(stack.ops, **waste))), stack.bound)


class Alone(nn.Module):
    """A quantized layer that shares no rows: it quantizes its own input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Rounded(TorchDispatchMode):
    """Counts tensors that are rounded to integers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket is torch.ops.aten.round
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["builtin-int8", "builtin-int8-rotated"])
@pytest.mark.parametrize("table", [REFERENCE, NATIVE], ids=["reference", "native"])
def test_layers_of_one_input_share_its_quantized_rows(table, form):
    """12 times a double and 2 a single block without sharing, 8 and 2 with it (once more where text and image, entering the first
    single block, are still apart), and no bit of the result changes."""
    net, inputs = step(replace(STACKS["reference"], ops=table))
    for name, layer in Recipe(form).layers(net).items():
        net.set_submodule(name, builtin.quantize(layer.weight, FORMATS[form], torch.float32, torch.device("cpu")))
    with torch.no_grad(), Rounded() as shared:
        ours = net(*inputs)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, builtin.QuantizedLinear):
            net.set_submodule(name, Alone(layer))
    with torch.no_grad(), Rounded() as alone:
        theirs = net(*inputs)
    doubles, singles = SHAPE["num_layers"], SHAPE["num_single_layers"]
    assert (shared.count, alone.count) == (8 * doubles + 2 * singles + 1, 12 * doubles + 2 * singles)
    assert torch.equal(ours, theirs)


def test_a_step_is_one_graph_and_compiles_once_per_size():
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    net, inputs = step()
    compiled = torch.compile(net, backend=counter, dynamic=False)
    latents, context, _, rotary, keep = inputs
    seen = []
    with torch.no_grad():
        for sigma in (0.5, 0.3, 0.1):
            compiled(latents, context, net.modulation(torch.tensor(sigma), 2.5), rotary, keep)
            seen.append(counter.frame_count)
    broken = dict(counters["graph_break"])
    torch._dynamo.reset()
    assert not broken
    assert seen[0] == seen[1] == seen[2] > 0, "a step of the same size compiled anew"
