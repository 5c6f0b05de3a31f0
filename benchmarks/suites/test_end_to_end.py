"""A whole picture, prompt to file, by every tier and variant of the bundled model as a user calls it."""

import pytest

from flux2_local import Flux2
from flux2_local.presets import BUNDLED


@pytest.mark.parametrize("size", [(512, 512), (1024, 768)], ids=["512x512", "1024x768"])
@pytest.mark.parametrize(
    ("variant", "acceleration"),
    [("standard", "none"), ("standard", "regular"), ("standard", "high"), ("turbo", "regular"), ("flash", "regular")],
)
def test_picture(variant, acceleration, size, load, timed, benchmark):
    flux = load(variant, acceleration)
    shape = {"width": size[0], "height": size[1]}
    result = timed(lambda: flux.generate("a lighthouse at dusk", seed=0, image_size=shape, enable_safety_checker=False))
    benchmark.extra_info["stages"] = result.timings.to_dict()
    assert result.images[0].image.size == size


@pytest.mark.parametrize("lora", [None, BUNDLED / "turbo.safetensors"], ids=["without a LoRA", "with a LoRA"])
def test_lora(lora, device, timed):
    """Quantized, the same steps with and without."""
    flux = Flux2.load("tiny", quantize="builtin-int8", lora=lora, device=str(device))
    fields = {"seed": 0, "image_size": "square_hd", "num_inference_steps": 8, "enable_safety_checker": False}
    timed(lambda: flux.generate("a lighthouse at dusk", **fields))
