"""The decoder's upsampling at the lower resolution gives what doubling and convolving gives."""

import pytest
import torch
from test_plan import need

from flux2_local.hardware import from_preset
from flux2_local.model.autoencoder import Autoencoder, AutoencoderConfig, Doubling, Resample
from flux2_local.plan import make_plan

CONFIG = AutoencoderConfig(block_out_channels=(8, 12, 16), layers_per_block=1, latent_channels=4, norm_num_groups=2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (4, 8)])
def test_a_doubling_is_its_convolution(size, layout):
    torch.manual_seed(0)
    plain = Resample(6, up=True).double().to(memory_format=layout)
    folded = Doubling(plain.conv).double().to(memory_format=layout)
    x = torch.randn(2, 6, *size, dtype=torch.double).to(memory_format=layout)
    with torch.no_grad():
        got, want = folded(x), plain(x)
    assert got.shape == want.shape == (2, 6, 2 * size[0], 2 * size[1])
    assert got.is_contiguous(memory_format=layout)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # its weights were summed in float32


@pytest.mark.parametrize("tile", [0, 64])
def test_a_picture_is_the_same(tile):
    torch.manual_seed(0)
    vae = Autoencoder(CONFIG).eval()
    latents = torch.randn(1, 16, 12, 9)
    with torch.no_grad():
        want = vae.decode(latents, tile)
        vae.fold_upsampling()
        got = vae.decode(latents, tile)
    assert sum(isinstance(m, Doubling) for m in vae.modules()) == 2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "tier", "folded"),
    [("cpu-8", "none", True), ("cpu-8", "high", True), ("rtx-4090", "none", False), ("rtx-4090", "high", False)],
)
def test_it_is_used_where_it_was_measured(device, tier, folded):
    plan = make_plan(need(tier=tier), from_preset(device, 2**36))
    choice = next(c for c in plan.choices if c.what == "upsampling")
    assert plan.fold_upsampling is folded and choice.reason and choice.rejected[0][1]
