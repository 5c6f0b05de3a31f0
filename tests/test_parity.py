"""With acceleration="none" the pixels are those of diffusers' pipelines, called directly with the same components."""

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline, Flux2Pipeline
from PIL import Image

from flux2_local import Flux2

MODELS = {"dev": Flux2Pipeline, "klein": Flux2KleinPipeline, "klein_base": Flux2KleinPipeline}
SIZES = [(512, 512), (512, 640), (528, 512)]


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((100, 130), (64, 70))]


@pytest.fixture(scope="module", params=list(MODELS))
def both(request):
    """A model's folder loaded by diffusers and by us."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    pipe = MODELS[request.param].from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, Flux2.load(folder, acceleration="none")


def by_diffusers(pipe, seeds, size, images):
    return pipe(
        prompt="a red boat on the sea",
        image=images,
        width=size[0],
        height=size[1],
        num_inference_steps=4,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **({} if isinstance(pipe, Flux2KleinKVPipeline) else {"guidance_scale": 3.5}),  # which has none
    ).images


def by_us(flux, seed, count, size, images):
    return flux.generate(
        "a red boat on the sea",
        images=images or (),
        image_size={"width": size[0], "height": size[1]},
        num_inference_steps=4,
        guidance_scale=3.5,
        num_images=count,
        seed=seed,
        enable_safety_checker=False,
    ).images


def difference(theirs, ours):
    return np.abs(np.asarray(theirs).astype(int) - np.asarray(ours.image).astype(int))


def same(theirs, ours):
    """Equal but for float32's rounding: one level, in less than a thousandth of the values."""
    different = difference(theirs, ours)
    return different.max() <= 1 and (different > 0).mean() < 1e-3


@pytest.mark.parametrize("references", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_the_pipelines(both, size, references):
    pipe, flux = both
    images = pictures() if references else None
    (want,) = by_diffusers(pipe, [7], size, images)
    (got,) = by_us(flux, 7, 1, size, images)
    assert np.asarray(want).std() > 20
    assert same(want, got)


@pytest.mark.parametrize("references", [False, True])
def test_three_images_are_the_pipelines(both, references):
    """Each equals the pipeline's picture of its seed; the pipeline's batch rounds a few last bits differently."""
    pipe, flux = both
    images = pictures() if references else None
    got = by_us(flux, 7, 3, SIZES[0], images)
    batch = by_diffusers(pipe, [7, 8, 9], SIZES[0], images)
    for i in range(3):
        (alone,) = by_diffusers(pipe, [7 + i], SIZES[0], images)
        assert same(alone, got[i])
        assert difference(batch[i], got[i]).max() <= 1 and (difference(batch[i], got[i]) > 0).mean() < 0.01


def test_image_i_is_what_its_own_seed_gives(both):
    _, flux = both
    fields = {"image_size": "square", "num_inference_steps": 4, "enable_safety_checker": False}
    three = flux.generate("a boat", num_images=3, seed=20, **fields)
    for i in range(3):
        alone = flux.generate("a boat", seed=20 + i, **fields)
        assert np.array_equal(np.asarray(alone.images[0].image), np.asarray(three.images[i].image))


def test_any_size_in_range_is_exact(both):
    _, flux = both
    fields = {"num_inference_steps": 4, "enable_safety_checker": False, "seed": 1}
    odd = flux.generate("a boat", image_size={"width": 513, "height": 525}, **fields).images[0]
    whole = flux.generate("a boat", image_size={"width": 528, "height": 528}, **fields).images[0]
    assert (odd.width, odd.height) == odd.image.size == (513, 525)
    assert np.array_equal(np.asarray(odd.image), np.asarray(whole.image)[1:526, 7:520])
