"""Classifier-free guidance of base models: its two passes as one batch are the same pictures, and the plan says when they are."""

from dataclasses import replace

import numpy as np
import pytest
from test_many import watch
from test_offload import streaming
from test_parity import pictures
from test_plan import card, need

from flux2_local import Flux2, sampler
from flux2_local.candidates import LAYOUTS, Draft, Terms, ways
from flux2_local.costs import Work
from flux2_local.hardware import from_preset
from flux2_local.plan import Wishes, built, explain, make_plan
from flux2_local.presets import CachePolicy, parse_bytes

FIELDS = {
    "image_size": "square",
    "seed": 3,
    "num_inference_steps": 4,
    "guidance_scale": 4,
    "enable_safety_checker": False,
}
BASE = "klein-4b-base"


@pytest.fixture(scope="module")
def flux(klein_base_folder):
    return Flux2.load(klein_base_folder, dtype="float32", quantize="none")


def drawn(monkeypatch, flux, fields, **changes):
    """Pictures of a plan with ``changes``, how large each evaluation's batch was, and the steps that its caches skipped."""
    plan = type(flux)._plan_for
    with monkeypatch.context() as patched:
        patched.setattr(flux, "_plan_for", lambda *asked: replace(plan(flux, *asked), **changes), raising=False)
        counts, caches = watch(patched, flux)
        images = flux.generate("a red boat", **{**FIELDS, **fields}).images
    return [np.asarray(image.image).astype(int) for image in images], counts, [cache.skipped for cache in caches]


def same(some, others):
    """Equal but for float32's rounding, and pictures at all."""
    for one, other in zip(some, others, strict=True):
        different = np.abs(one - other)
        assert one.std() > 20 and different.max() <= 1 and (different > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("fields", "pass_sizes"),
    [({}, 1), ({"num_images": 2}, 2), ({"images": pictures()}, 1)],
    ids=["alone", "two pictures", "references"],
)
def test_together_the_passes_give_the_same_pictures(flux, monkeypatch, fields, pass_sizes):
    apart, counts, _ = drawn(monkeypatch, flux, fields, together=False, batch=2)
    assert counts == [pass_sizes] * 8
    together, counts, _ = drawn(monkeypatch, flux, fields, together=True, batch=2)
    assert counts == [2 * pass_sizes] * 4
    same(together, apart)


def test_without_guidance_there_is_one_pass_however_it_is_planned(flux, monkeypatch):
    fields = {"guidance_scale": 1}
    apart, counts, _ = drawn(monkeypatch, flux, fields, together=False)
    assert counts == [1] * 4
    together, counts, _ = drawn(monkeypatch, flux, fields, together=True)
    assert counts == [1] * 4 and np.array_equal(together, apart)


def test_each_pass_skips_its_own_steps(flux, monkeypatch):
    """At a threshold between what the two change, so that one is computed where the other is not; and by a mask."""
    seen = []

    def measured(cache, added):
        seen.append(
            None if cache._first is None else float((added - cache._first).abs().mean() / cache._first.abs().mean())
        )
        return False

    with monkeypatch.context() as patched:
        patched.setattr(sampler.StepCache, "_may_skip", measured)
        drawn(monkeypatch, flux, {}, together=False, cache=CachePolicy(threshold=0.0, warmup=1, tail=1, limit=1))
    first, second = seen[2:4]  # of the prompt's and the empty prompt's pass in the second step
    between, mask = (CachePolicy(threshold=t, warmup=1, tail=1, limit=1) for t in ((first + second) / 2, float("inf")))
    for policy in (between, mask):
        apart, _, skipped = drawn(monkeypatch, flux, {}, together=False, cache=policy)
        together, counts, same_steps = drawn(monkeypatch, flux, {}, together=True, cache=policy)
        assert counts == [2] * 4 and skipped == same_steps and any(skipped)
        assert (skipped[0] != skipped[1]) == (policy is between)
        same(together, apart)


def test_streamed_blocks_come_once_for_both(klein_base_folder, monkeypatch):
    found, copied = [], []
    for together in (False, True):
        flux, (link, _) = streaming(klein_base_folder, (0, 3), dtype="float32", quantize="none")
        found.append(drawn(monkeypatch, flux, {}, together=together)[0])
        blocks = [block.size for block in flux._components.hold_transformer.blocks]
        copied.append((link.copied - sum(blocks)) / sum(size for n, size in enumerate(blocks) if n not in (0, 3)))
    same(*found)
    assert 7 <= copied[0] <= 8 and 3 <= copied[1] <= 4, "evaluations after the first, and what is copied ahead"


def test_the_exact_tier_computes_each_pass_by_itself(klein_base_folder):
    """As the reference does (test_parity holds its pixels), whatever that takes."""
    assert ways(need(BASE, tier="none")) == (False,) and ways(need("klein-4b")) == (False,)
    for memory in ("22GiB", "6GiB"):
        plan = make_plan(need(BASE, tier="none"), card(memory))
        assert not plan.together and "exact tier computes each by itself" in explain(plan)
    assert "guidance" not in [choice.what for choice in make_plan(need(), card("6GiB")).choices]


def choice_of(plan):
    return next(choice for choice in plan.choices if choice.what == "guidance")


def test_streamed_passes_run_together_and_resident_ones_apart():
    resident, streamed = (make_plan(need(BASE), card(memory), Wishes(quantize="none")) for memory in ("22GiB", "5GiB"))
    assert (resident.transformer.placement, resident.together) == ("resident", False)
    assert (streamed.transformer.placement, streamed.together) == ("streamed", True)
    assert "come once for both" in explain(streamed) and "fills the device by itself" in explain(resident)
    for plan in (resident, streamed):
        ((other, why),) = choice_of(plan).rejected
        assert {choice_of(plan).value, other} == {"one pass", "two passes"} and "GiB" in why
    (apart,) = (o for o in streamed.options if o.name.startswith("streamed") and "two passes" in o.name)
    assert apart.seconds > 1.05 * streamed.seconds
    assert built(replace(streamed, together=False)) == built(streamed), "requests may differ without loading again"


def test_apart_where_there_is_no_memory_for_both():
    """At a size where the activations of two are more than the smallest budget has."""
    large = need(BASE, work=Work(2048, 2048, 28))
    terms = Terms(large, from_preset("rtx-4090"), "bfloat16", 0, "triton", "sdpa", False, False)
    apart, together = (Draft(terms, None, LAYOUTS[-1], way).denoising(()) for way in (False, True))
    assert together > 1.4 * apart
    plan = make_plan(
        large, card("24GiB"), Wishes(vram=int((apart + together) / 2) + parse_bytes("600MiB"), quantize="none")
    )
    assert not plan.together and plan.peak_bytes < together
    assert "needs" in choice_of(plan).rejected[0][1]
