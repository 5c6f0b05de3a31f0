"""Every attention backend that runs here, in the device's fast type, at the bundled model's shape and klein-4b's at 512².

A result's ``error`` is the largest deviation from the same inputs' float32 result, as a share of the largest value.
"""

import pytest
import torch

from flux2_local.attention import BACKENDS, load, problem_on
from flux2_local.hardware import probe
from flux2_local.model.ops import REFERENCE
from flux2_local.presets import tiers

SHAPES = {"tiny": (336, 4, 64, 50), "klein-4b": (1536, 24, 128, 5)}
"""Tokens of text and picture, heads, channels of a head, and rounds: more where one takes little."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BACKENDS)
@torch.inference_mode()
def test_attend(name, shape, device, timed, benchmark):
    tokens, heads, channels, rounds = SHAPES[shape]
    hardware = probe(str(device))
    dtype = hardware.fast_dtypes[0]
    problem = problem_on(hardware, dtype, tokens, heads, channels)
    if reason := BACKENDS[name].reason_against(problem, tiers()["high"]):
        pytest.skip(f"{name}: {reason}")
    generator = torch.Generator(device).manual_seed(0)
    given = [torch.randn(1, tokens, heads, channels, generator=generator, device=device) for _ in range(3)]
    given = [x.to(getattr(torch, dtype)) for x in given]
    attend = load(name)
    wanted = REFERENCE.attend(*(x.float() for x in given))
    error = float((attend(*(x.clone() for x in given)).float() - wanted).abs().max() / wanted.abs().max())
    assert error < 0.1
    benchmark.extra_info |= {"dtype": dtype, "error": error}
    timed(lambda: attend(*given), rounds)
