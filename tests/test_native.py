"""The table of torch's own fused operators: right for every kind of input, and within rounding of the reference as a whole."""

import numpy as np
import pytest
import torch

from flux2_local import Flux2
from flux2_local.model import ops
from flux2_local.model.native import NATIVE
from flux2_local.model.ops import REFERENCE, Rotary

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def close(got, want, dtype):
    assert got.dtype == dtype and got.shape == want.shape
    assert (got.double() - want).abs().max() <= TOLERANCE[dtype] * want.abs().max()


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("modulations", [1, 2])
def test_the_norm_is_modulated(dtype, modulations):
    x = 3 * draw(2, 7, 24, dtype=dtype) + 1
    shift, scale = (draw(modulations, 1, 24, dtype=dtype, seed=s) for s in (1, 2))
    want = ops.modulated_norm(x.double(), shift.double(), scale.double())
    close(NATIVE.modulated_norm(x, shift, scale), want, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_residual_is_added_and_then_normalised(dtype):
    x, y = (3 * draw(2, 7, 24, dtype=dtype, seed=s) + 1 for s in (0, 3))
    gate, shift, scale = (draw(1, 1, 24, dtype=dtype, seed=s) for s in (1, 2, 4))
    total, normal = NATIVE.residual_norm(x, gate, y, shift, scale)
    close(total, x.double() + gate.double() * y.double(), dtype)
    assert torch.equal(normal, NATIVE.modulated_norm(total, shift, scale))


def test_a_sum_past_float16_stays_finite():
    x, one = torch.full((1, 3, 16), 6e4).half(), torch.ones(1, 1, 16).half()
    for table in (NATIVE, REFERENCE):
        total, normal = table.residual_norm(x, one, x, 0 * one, 0 * one)
        assert (total == 65504).all() and normal.isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("into", [False, True])
def test_rows_are_normalised_and_rotated(dtype, into):
    """Out of a packed projection, and into part of a longer sequence."""
    packed, angles = draw(2, 5, 3 * 48, dtype=dtype), 9 * draw(5, 8, seed=2)
    pair = [packed[..., i : i + 48].unflatten(-1, (3, 16)) for i in (0, 48)]
    weights = [draw(16, dtype=dtype, seed=s) for s in (1, 3)]
    whole = torch.full((2, 2, 9, 3, 16), torch.nan, dtype=dtype)
    places = (whole[0, :, 2:7], whole[1, :, 2:7])
    found = NATIVE.qk_norm_rope(*pair, *weights, Rotary(angles.cos(), angles.sin()), places if into else None)
    for got, x, weight, place in zip(found, pair, weights, places, strict=True):
        normal = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + ops.EPS) * weight.double()
        turned = torch.view_as_complex(normal.unflatten(-1, (-1, 2))) * torch.polar(
            torch.ones(5, 1, 8).double(), angles.double()[:, None]
        )
        close(got, torch.view_as_real(turned).flatten(-2), dtype)
        assert (got.data_ptr() == place.data_ptr()) is into
    assert whole[:, :, :2].isnan().all() and whole[:, :, 7:].isnan().all()


@pytest.fixture
def exact():
    return Flux2.load("tiny", acceleration="none")


def test_a_picture_differs_by_float32s_rounding_only(exact):
    """From the reference's table, in the tier that promises the reference's pixels."""
    fields = {"image_size": "square", "num_inference_steps": 4, "seed": 3, "enable_safety_checker": False}
    network = exact._components.transformer
    assert exact.plan.ops == "native" and network.ops.qk_norm_rope is NATIVE.qk_norm_rope
    native, reference = (picture(exact, network, table, fields) for table in (NATIVE, REFERENCE))
    different = np.abs(native - reference)
    assert different.max() <= 1 and (different > 0).mean() < 1e-3


def picture(flux, network, table, fields):
    network.ops = table
    return np.asarray(flux.generate("a red ball", **fields).images[0].image).astype(int)
