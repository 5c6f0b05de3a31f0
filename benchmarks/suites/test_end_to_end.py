"""A whole picture, prompt to file, by every tier and variant of the bundled model as a user calls it."""

import pytest


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
