"""Noise levels against diffusers' scheduler and pipelines, bit for bit."""

import numpy as np
import pytest
from components import scheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from flux2_local.presets import models
from flux2_local.schedule import empirical_mu, make_schedule


def diffusers_sigmas(tokens: int, steps: int, sigmas: np.ndarray | list[float]) -> np.ndarray:
    s = scheduler()
    s.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(tokens, steps))
    return s.sigmas.numpy()


@pytest.mark.parametrize("tokens", [256, 1024, 3072, 4096, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [4, 8, 28, 50])
def test_dynamic_schedule_is_the_pipelines(tokens, steps):
    ours = make_schedule(models()["dev"].variants["standard"], steps, tokens)
    theirs = diffusers_sigmas(tokens, steps, np.linspace(1.0, 1 / steps, steps))
    assert ours.sigmas.dtype == np.float32
    np.testing.assert_array_equal(ours.sigmas, theirs)
    assert empirical_mu(tokens, steps) == compute_empirical_mu(tokens, steps)


def test_turbo_at_a_square_megapixel_is_the_published_recipe():
    recipe = models()["dev"].variants["turbo"]
    published = [1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031]
    ours = make_schedule(recipe, 8, 4096)
    np.testing.assert_array_equal(ours.sigmas, diffusers_sigmas(4096, 8, published))
    assert "published" in ours.kind


@pytest.mark.parametrize("tokens", [1024, 3072, 9216])
def test_turbo_elsewhere_is_a_constant_shift(tokens):
    ours = make_schedule(models()["dev"].variants["turbo"], 8, tokens)
    u = np.linspace(1, 1 / 8, 8)
    np.testing.assert_allclose(ours.sigmas[:-1], 3 * u / (1 + 2 * u), rtol=1e-6)
    assert ours.sigmas[-1] == 0 and "shift 3" in ours.kind


@pytest.mark.parametrize("name", list(models()))
def test_every_recipe_gives_falling_levels(name):
    for recipe in models()[name].variants.values():
        levels = make_schedule(recipe, recipe.steps, 3072).sigmas
        assert levels[0] == 1 and levels[-1] == 0 and np.all(np.diff(levels) < 0)
