"""Step caching: which steps are skipped, what stands in for them, and that nothing changes where none is."""

import json
import math
import tomllib
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch

from benchmarks import masks
from flux2_local import Flux2, store
from flux2_local.cache import Recorded, StepCache, watched
from flux2_local.candidates import Need
from flux2_local.choices import choose_cache
from flux2_local.costs import Work
from flux2_local.errors import RequestError
from flux2_local.explore import family_architecture
from flux2_local.hardware import from_preset
from flux2_local.plan import make_plan
from flux2_local.presets import CachePolicy, families, models, tiers
from scripts import calibrate_cache

EVERY = CachePolicy(threshold=1e9, warmup=2, tail=1, limit=2)
MASK = replace(EVERY, threshold=float("inf"))
NEVER = CachePolicy(threshold=0.0, warmup=2, tail=1, limit=2)
SIX = {"image_size": "square", "num_inference_steps": 9, "enable_safety_checker": False, "seed": 3}


def picture(flux):
    return np.asarray(flux.generate("a boat", **SIX).images[0].image)


def with_policy(monkeypatch, policy):
    """Every plan from here on has this policy."""
    from flux2_local import settings

    make = settings.make_plan
    monkeypatch.setattr(settings, "make_plan", lambda *a: replace(make(*a), cache=policy))


def test_a_linear_course_is_extrapolated_exactly():
    sigmas = (1.0, 0.9, 0.7, 0.6, 0.2, 0.0)
    cache = StepCache(replace(EVERY, limit=3, tail=0), sigmas)
    course = lambda s: torch.full((1, 2, 3), 5.0 - 2 * s)  # noqa: E731
    for step in range(2):
        assert cache.rest(torch.ones(1)) is None
        cache.keep(course(sigmas[step]))
    for step in range(2, 5):
        torch.testing.assert_close(cache.rest(torch.ones(1)), course(sigmas[step]))
    assert cache.skipped == [2, 3, 4]


def test_a_step_that_changes_much_is_computed():
    cache = StepCache(replace(EVERY, threshold=0.1), tuple(np.linspace(1, 0, 9)))
    answers = []
    for value in (1.0, 1.0, 1.05, 1.2, 1.21, 1.22, 1.23):
        answers.append(cache.rest(torch.full((4,), value)) is not None)
        if not answers[-1]:
            cache.keep(torch.zeros(4))
    assert answers == [False, False, True, False, True, True, False]


@pytest.mark.parametrize(("policy", "first"), [(EVERY, 9), (MASK, 5)])
def test_steps_that_may_be_skipped_are(dev_folder, monkeypatch, policy, first):
    """Steps 0 and 1 are computed, 4 and 7 after two skipped ones each, and the last; the first block in every one or in those."""
    flux = Flux2.load(dev_folder)
    calls = []
    network = flux._components.transformer
    for name, blocks in (("first", network.transformer_blocks), ("single", network.single_transformer_blocks)):
        blocks[0].register_forward_hook(lambda *_, name=name: calls.append(name))
    whole = picture(flux)
    assert calls.count("first") == calls.count("single") == 9
    with_policy(monkeypatch, policy)
    calls.clear()
    quick = picture(flux)
    assert (calls.count("first"), calls.count("single")) == (first, 5)
    assert quick.shape == whole.shape and not np.array_equal(quick, whole)


@pytest.mark.parametrize("threshold", [0.5, math.inf])
def test_a_recorded_mask_skips_exactly_its_steps(dev_folder, monkeypatch, threshold):
    """Whatever the policy would say of them: its warmup, its tail, and more in a row than its limit."""
    flux = Flux2.load(dev_folder)
    skips = (1, 2, 3, 4, 6, 8)
    with_policy(monkeypatch, Recorded(threshold, warmup=9, tail=9, limit=1, skips=skips))
    calls = []
    network = flux._components.transformer
    for name, blocks in (("first", network.transformer_blocks), ("single", network.single_transformer_blocks)):
        blocks[0].register_forward_hook(lambda *_, name=name: calls.append(name))
    with watched() as seen:
        picture(flux)
    assert seen == [(threshold < math.inf, list(skips))]
    assert (calls.count("first"), calls.count("single")) == (9 if threshold < math.inf else 3, 3)


def test_what_is_recorded_is_what_is_replayed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(masks, "FOLDER", tmp_path)
    with pytest.raises(RequestError, match="--steps 8"):
        masks.read("high", 8)
    monkeypatch.setattr("sys.argv", ["masks", "--steps", "8", "--pictures", "1"])
    masks.main()
    kept = json.loads(masks.place(8).read_text())
    assert kept["commit"] and kept["torch"] and kept["model"] == "tiny" and kept["prompts"]
    own = tiers()["high"].cache["tiny"].at(8)
    assert masks.read("high", 8) == Recorded(*astuple(own), skips=(3, 5))
    assert "high: 2 of 8 steps skipped: 3, 5" in capsys.readouterr().out


def test_the_masks_that_come_along_are_of_devs_steps():
    for tier in ("regular", "high"):
        mask = masks.read(tier, models()["dev"].recipe("standard").steps)
        assert min(mask.skips) > 0 and max(mask.skips) < mask.steps == 28
    assert len(masks.read("regular", 28).skips) < len(masks.read("high", 28).skips)


@pytest.mark.parametrize("folder", ["dev_folder", "klein_base_folder"])
def test_nothing_changes_where_no_step_is_skipped(folder, monkeypatch, request):
    flux = Flux2.load(request.getfixturevalue(folder))
    want = picture(flux)
    with_policy(monkeypatch, NEVER)
    assert np.array_equal(picture(flux), want)


def test_only_calibrated_models_and_many_steps_are_cached():
    high = replace(tiers()["high"], cache={"dev": EVERY})
    arch = family_architecture(models()["dev"])

    def chosen(name, variant, tier):
        return choose_cache(Need(name, variant, tier, arch, Work()))

    choice, policy = chosen("dev", "standard", high)
    assert policy == EVERY and choice.value == "first block"
    choice, policy = chosen("dev", "standard", replace(high, cache={"dev": MASK}))
    assert policy == MASK and choice.value == "mask" and "2 steps in a row" in choice.reason
    for name, variant, tier in (
        ("klein-4b", "standard", high),
        ("dev", "turbo", high),
        ("dev", "standard", tiers()["none"]),
    ):
        choice, policy = chosen(name, variant, tier)
        assert policy is None and choice.value == "off" and choice.reason


def test_fewer_steps_skip_fewer_in_a_row():
    policy = CachePolicy(math.inf, warmup=3, tail=1, limit=4)
    assert [policy.at(steps).limit for steps in (4, 14, 28, 50)] == [1, 2, 4, 7]


@pytest.mark.parametrize(
    ("steps", "policy"), [(28, MASK), (28, replace(MASK, limit=4)), (9, MASK), (4, MASK), (2, MASK)]
)
def test_the_skips_that_are_predicted_are_those_that_happen(steps, policy):
    cache = StepCache(policy, tuple(np.linspace(1, 0, steps + 1)))
    for step in range(steps):
        if cache.rest(torch.ones(1)) is None:
            cache.keep(torch.full((1,), float(step)))
    assert len(cache.skipped) == policy.skipped(steps)
    assert replace(policy, threshold=0.1, expected=1.0).skipped(steps) == len(cache.skipped)
    assert replace(policy, threshold=0.1, expected=0.25).skipped(28) == 7


@pytest.mark.parametrize("name", ["dev", "klein-4b-base"])
def test_a_threshold_that_is_not_calibrated_is_said_to_be(name):
    """And counted in the prediction; in the high tier alone, and not for distilled variants."""
    plans = {tier: plan_of(name, "standard", tier) for tier in ("regular", "high")}
    policy, choice = plans["high"].cache, next(c for c in plans["high"].choices if c.what == "step cache")
    assert plans["regular"].cache is None and not policy.measured and policy.skipped(28) == pytest.approx(8.12)
    assert "Not calibrated" in choice.reason and f"scripts.calibrate_cache --model {name}" in choice.reason
    blocks = sum(families()[models()[name].family]["transformer"][f"num_{kind}layers"] for kind in ("", "single_"))
    whole = plan_of(name, "standard", "high", steps=4).step_seconds  # none of four may be skipped
    assert plans["high"].step_seconds == pytest.approx(whole * (1 - 0.29 * (1 - 1 / blocks)))


@pytest.mark.parametrize(("name", "variant"), [("dev", "turbo"), ("dev", "flash"), ("klein-9b", "standard")])
def test_distilled_variants_compute_every_step(name, variant):
    assert plan_of(name, variant, "high").cache is None


def plan_of(name, variant, tier, steps=None):
    preset = models()[name]
    work = Work(1024, 1024, steps or preset.recipe(variant).steps)
    return make_plan(Need(name, variant, tiers()[tier], family_architecture(preset), work), from_preset("h200"))


@pytest.mark.parametrize("folder", ["dev_folder", "klein_base_folder"])
def test_any_model_can_be_calibrated(folder, monkeypatch, request, capsys):
    """The row that is printed last is one for ``configs/tiers.toml``."""
    path = request.getfixturevalue(folder)
    options = ["--pictures", "1", "--steps", "6", "--warmups", "2", "--limits", "2", "--bound", "-99"]
    monkeypatch.setattr("sys.argv", ["calibrate", "--model", str(path), "--thresholds", "1e9", *options])
    calibrate_cache.main()
    *_, measured, best = capsys.readouterr().out.splitlines()
    name, policy = next(iter(tomllib.loads(best.partition("dB: ")[2])["cache"].items()))
    assert name == store.find(path, "standard").name and CachePolicy(**policy).measured
    assert (policy["threshold"], policy["warmup"], policy["limit"], policy["steps"]) == (1e9, 2, 2, 6)
    assert float(measured.split()[4]) > 5
