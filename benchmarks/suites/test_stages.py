"""The stages of one picture by the bundled model: reading the prompt, denoising, decoding, writing the file."""

import pytest
import torch

from flux2_local import images
from flux2_local.text import encode

SIZES = {"512x512": (512, 512), "1024x768": (1024, 768)}
STEPS = 4


def test_encode(load, timed):
    c = load()._components
    tokens = encode.tokenize(c.tokenizer, ["a lighthouse at dusk"], c.style)
    with c.hold_text_encoder():
        timed(lambda: encode.embed(c.text_encoder, tokens, c.device))


@pytest.mark.parametrize("size", SIZES)
def test_denoise(size, load, timed, benchmark):
    """Four steps in the exact tier, told by the pipeline's own clock beside the whole call's."""
    flux, (width, height) = load("standard", "none"), SIZES[size]
    fields = {"image_size": {"width": width, "height": height}, "num_inference_steps": STEPS, "seed": 0}
    result = timed(lambda: flux.generate("a lighthouse at dusk", enable_safety_checker=False, **fields))
    benchmark.extra_info["stages"] = result.timings.to_dict()


@pytest.mark.parametrize("size", SIZES)
def test_decode(size, load, timed):
    c, (width, height) = load()._components, SIZES[size]
    grid = height // c.vae.multiple, width // c.vae.multiple
    latents = torch.randn(1, c.transformer.config.in_channels, *grid, device=c.device).to(c.vae.dtype)
    with c.hold_vae(), torch.inference_mode():
        timed(lambda: c.vae.decode(latents))


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_finish(form, load, timed):
    picture = (
        load().generate("a lighthouse at dusk", seed=0, num_inference_steps=STEPS, image_size="square_hd").images[0]
    )
    timed(lambda: images.encode(picture.image, form, picture.settings))
