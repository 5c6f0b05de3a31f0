"""Each operation between the matmuls, in every table that runs here, at a small and a real shape; correct, or not timed."""

import pytest
import torch

from benchmarks.synthetic import fast
from flux2_local.model.native import NATIVE
from flux2_local.model.ops import REFERENCE, Rotary
from flux2_local.model.transformer import TransformerConfig

SHAPES = {"small": (576, 4, 50), "klein-4b at 1024": (4608, 24, 5)}
"""Tokens of text and picture, heads of 128, and rounds: more where one takes so little that what else runs is most of the spread."""


def inputs(name: str, tokens: int, heads: int, device: torch.device, dtype: torch.dtype) -> tuple:
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    width, by_head = heads * 128, (1, tokens, heads, 128)
    angles = torch.randn(tokens, 64, generator=generator, device=device)
    return {
        "modulated_norm": lambda: (noise(1, tokens, width), noise(1, 1, width), noise(1, 1, width), None),
        "residual_norm": lambda: (
            noise(1, tokens, width), noise(1, 1, width), noise(1, tokens, width), noise(1, 1, width), noise(1, 1, width), None,
        ),
        "qk_norm_rope": lambda: (
            noise(*by_head), noise(*by_head), noise(128), noise(128), Rotary(angles.cos(), angles.sin()), None,
        ),
        "swiglu": lambda: (noise(1, tokens, 6 * width), None),
        "attend": lambda: (noise(*by_head), noise(*by_head), noise(*by_head), None),
    }[name]()  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("table", ["reference", "native", "fused"])
@pytest.mark.parametrize("name", ["modulated_norm", "residual_norm", "qk_norm_rope", "swiglu", "attend"])
@torch.inference_mode()
def test_op(name, table, shape, device, timed, benchmark):
    tokens, heads, rounds = SHAPES[shape]
    dtype, best = fast(device, TransformerConfig(num_attention_heads=heads))
    if table == "fused" and best is NATIVE:
        pytest.skip("the fused kernels need an NVIDIA card of compute capability 8.0 or newer, and Triton")
    function = getattr({"reference": REFERENCE, "native": NATIVE, "fused": best}[table], name)
    given = inputs(name, tokens, heads, device, dtype)
    wanted = getattr(REFERENCE, name)(*(x.float() if torch.is_tensor(x) and x.ndim != 2 else x for x in given))
    found = function(*given)
    for one, exact in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(one.float(), exact, rtol=0.03, atol=0.03 * float(exact.abs().max()))
    benchmark.extra_info["dtype"] = str(dtype)
    timed(lambda: function(*given), rounds)
