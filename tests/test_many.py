"""Many pictures through one model: what is denoised together, and that it changes no picture."""

import statistics
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
from simulated import SimulatedLink

from flux2_local import Flux2, costs, footprint, load, many, sampler
from flux2_local.candidates import LAYOUTS, Draft, Need, Terms
from flux2_local.costs import Work
from flux2_local.explore import family_architecture
from flux2_local.hardware import from_preset
from flux2_local.offload.streamed import Streamed
from flux2_local.plan import Wishes, built, make_plan
from flux2_local.presets import CachePolicy, devices, models, tiers
from flux2_local.progress import Reporter
from flux2_local.request import make_request

SMALL = {"image_size": "square", "num_inference_steps": 8, "enable_safety_checker": False}
SCENES = ["a red boat on the sea", "a fox", "a house at night", "a yellow sun over green hills"]


def watch(monkeypatch, flux):
    """How many pictures each evaluation of the transformer was given, and every step cache that was made."""
    counts, caches = [], []

    class Watched(sampler.StepCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

    monkeypatch.setattr(sampler, "StepCache", Watched)
    net = flux._components.transformer
    hooks: dict = {1: lambda _, inputs: counts.append(len(inputs[0]))}
    monkeypatch.setattr(net, "_forward_pre_hooks", hooks)
    return counts, caches


def changes(monkeypatch, flux, step):
    """How much the first block of each scene changes at ``step``."""
    seen, plan = [], flux._plan_for

    class Measured(sampler.StepCache):
        def rest(self, added):
            if self.step + 1 == step:
                seen.append(float((added - self._first).abs().mean() / self._first.abs().mean()))
            return super().rest(added)

    never = CachePolicy(threshold=0.0, warmup=1, tail=1, limit=1)
    with monkeypatch.context() as patched:
        patched.setattr(sampler, "StepCache", Measured)
        patched.setattr(flux, "_plan_for", lambda *asked: replace(plan(*asked), cache=never))
        for number, scene in enumerate(SCENES):
            flux.generate(scene, seed=number, **SMALL)
    return seen


def test_a_picture_is_the_same_whatever_is_denoised_with_it(tiny, monkeypatch):
    flux, plan = tiny, tiny._plan_for
    between = statistics.median(changes(monkeypatch, flux, 3))
    policy = CachePolicy(threshold=between, warmup=3, tail=1, limit=2)
    monkeypatch.setattr(flux, "_plan_for", lambda *asked: replace(plan(*asked), cache=policy))
    counts, caches = watch(monkeypatch, flux)
    alone = [flux.generate(scene, seed=n, **SMALL).images[0].data for n, scene in enumerate(SCENES)]
    skipped = [cache.skipped for cache in caches]
    assert set(counts) == {1} and len({tuple(s) for s in skipped}) > 1, "pictures that skip different steps"
    counts.clear()
    caches.clear()
    found = flux.generate_many({"prompt": scene, "seed": n, **SMALL} for n, scene in enumerate(SCENES))
    assert [result.images[0].data for result in found] == alone
    assert counts == [4] * 8
    counts.clear()
    several = flux.generate(SCENES[1], seed=1, num_images=2, **SMALL)
    assert several.images[0].data == alone[1] and counts == [2] * 8


def test_guided_by_the_empty_prompt_too(klein_base_folder, monkeypatch):
    flux = Flux2.load(klein_base_folder)
    few = {**SMALL, "num_inference_steps": 4}
    alone = [flux.generate(scene, seed=n, **few).images[0].data for n, scene in enumerate(SCENES[:3])]
    plan = flux._plan_for
    monkeypatch.setattr(flux, "_plan_for", lambda *asked: replace(plan(*asked), batch=3))
    counts, _ = watch(monkeypatch, flux)
    found = flux.generate_many({"prompt": scene, "seed": n, **few} for n, scene in enumerate(SCENES[:3]))
    assert [result.images[0].data for result in found] == alone
    assert counts == [3] * 8, "two evaluations a step"


def test_groups_are_of_one_kind_and_follow_from_the_order():
    def request(**fields):
        return make_request("standard", {"prompt": "a", **fields})

    asked = [
        *[request() for _ in range(5)],
        request(guidance_scale=3),
        request(guidance_scale=3, num_images=4),
        request(guidance_scale=3),
        request(image_size="square"),
        request(image_size="square", images=["x.png"]),
        request(image_size="square", images=["x.png"]),
        request(image_size="square", seed=3),
    ]
    groups = many.grouped(enumerate(asked), lambda item: item[1], lambda _: 2)
    places = [[place for place, _ in group] for group in groups]
    assert places == [[0, 1], [2, 3], [4], [5], [6], [7], [8], [9], [10], [11]]


def test_nothing_is_read_further_ahead_than_needed():
    taken = []
    asked = (taken.append(n) or make_request("standard", {"prompt": "a"}) for n in range(9))
    groups = many.with_following(many.grouped(asked, lambda one: one, lambda _: 2), 1)
    group, following = next(groups)
    assert (len(group), [len(part) for part in following], taken) == (2, [2], [0, 1, 2, 3])


def plan_on(device, model, width, height, tier="regular"):
    arch = family_architecture(models()[model])
    steps = models()[model].recipe("standard").steps
    return make_plan(Need(model, "standard", tiers()[tier], arch, Work(width, height, steps)), from_preset(device))


def test_no_card_gains_from_batches_of_the_smallest_flux_picture():
    """By the cost model: 1536 tokens are beyond every ridge, so weights are not what a step waits for."""
    for name, row in devices().items():
        if row.kind != "cpu":
            hardware = from_preset(name)
            assert costs.full_tokens(hardware, "bfloat16") <= 250
    plan = plan_on("h200", "klein-4b", 512, 512)
    assert plan.batch == 1 and "1536 tokens of one picture fill the device" in str(plan)


def test_the_plan_says_how_many_and_what_they_need(tiny):
    flux = tiny

    def plan(size, **fields):
        return flux._plan_for(make_request("standard", {"prompt": "a", "image_size": size, **fields}), [])

    assert [plan(s).batch for s in ("square", "landscape_4_3", "square_hd")] == [4, 2, 1]
    assert plan("square", acceleration="none").batch == 1
    assert "one picture has 336 tokens and the device takes 1024" in str(plan("square"))
    arch, one = load.architecture(flux.checkpoint), Work(512, 512)
    need = Need("tiny", "standard", tiers()["regular"], arch, one)
    plenty = make_plan(need, replace(flux.hardware, free=10**12), Wishes(dtype="float32"))
    own = {"ops": plenty.ops, "attention": plenty.attention, "threads": flux.hardware.cores}
    setup = footprint.Setup(arch, "float32", "cpu", skipping=True, folded=True, **own)
    single, four = (footprint.denoising(setup, replace(one, batch=count)) for count in (1, 4))
    names = ("transformer", "text_encoder", "vae")
    held = sum(footprint.weights(arch, name, "float32", folded=True).total for name in names)
    assert plenty.batch == 4 and four > 2 * single
    decoding = footprint.carried(setup, replace(one, batch=4)) + footprint.decoding(setup, 512, 512, 0)
    previewing = footprint.sampling(setup, replace(one, batch=4)) + footprint.decoding(setup, 512, 512, 0)
    kept = footprint.tables(setup, replace(one, batch=4))
    assert plenty.peak_bytes == held + kept + footprint.encoding(setup) + max(four, decoding, previewing)


def test_the_next_prompt_is_read_while_the_last_is_drawn(tiny, monkeypatch):
    from flux2_local.text.memory import Memory

    assert many.ahead(tiny) == 0, "a processor has nothing else to do it with"
    monkeypatch.setattr(many, "ahead", lambda flux: many.AHEAD_RESIDENT)
    events = []
    read, forward = Memory.read, type(tiny._components.transformer).forward
    monkeypatch.setattr(Memory, "read", lambda self, new: (events.append("read"), read(self, new))[1])
    monkeypatch.setattr(
        type(tiny._components.transformer),
        "forward",
        lambda self, *a: (events.append("step"), forward(self, *a))[1],
    )
    fields = {**SMALL, "num_inference_steps": 4, "guidance_scale": 2}
    results = tiny.generate_many([{"prompt": "a", **fields}, {"prompt": "b", **fields, "guidance_scale": 3}])
    next(results)
    assert events.index("read") < len(events) - 1 and tiny._components.text_encoder.encoded == 2
    list(results)


def test_what_is_read_beside_has_ended_before_anything_is_tried_again(tiny, monkeypatch):
    """With another text encoder, it may be."""
    from flux2_local.text.memory import Memory

    ended, begin, read = [], threading.Event(), Memory.read
    monkeypatch.setattr(many, "ahead", lambda flux: many.AHEAD_RESIDENT)
    monkeypatch.setattr(Memory, "read", lambda self, new: (begin.wait(5), read(self, new), ended.append(1)))
    monkeypatch.setattr(tiny, "_components", tiny._components)
    run = tiny._run({"prompt": "a", **SMALL}, Reporter(None, None))
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(RuntimeError, match="out of memory"), many.reading(tiny, [run], [run], thread):
            threading.Timer(0.1, begin.set).start()
            raise RuntimeError("out of memory")
        assert ended == [1]


def test_weights_that_visit_the_device_come_once_for_several_prompts(flash, monkeypatch):
    """Staged, as on a card with little memory; here nothing is moved, but it is counted."""
    held, plan = [], flash._plan_for

    def staged(one):
        return replace(one, text_encoder=replace(one.text_encoder, placement="staged"))

    @contextmanager
    def hold():
        held.append(flash)
        yield

    monkeypatch.setattr(many, "AHEAD_STAGED", 2)
    monkeypatch.setattr(flash, "plan", staged(flash.plan))
    monkeypatch.setattr(flash, "_built", built(flash.plan))
    monkeypatch.setattr(flash, "_plan_for", lambda *asked: replace(staged(plan(*asked)), batch=1))
    monkeypatch.setattr(flash, "_components", replace(flash._components, hold_text_encoder=hold))
    asked = [{"prompt": scene, "seed": n, "image_size": "square"} for n, scene in enumerate(SCENES)]
    found = [result.images[0].data for result in flash.generate_many(asked)]
    assert len(held) == 2, "three prompts, then the last"
    assert found[3] == flash.generate(**asked[3]).images[0].data


def test_the_transformer_comes_once_for_several_requests(klein_base_folder, monkeypatch):
    """Where it streams, requests of the same kind are denoised one after another while it is there; their embeddings wait outside."""
    flux = Flux2.load(klein_base_folder, dtype="float32", quantize="none")
    few = {**SMALL, "num_inference_steps": 4}
    asked = [{"prompt": scene, "seed": n, **few} for n, scene in enumerate([*SCENES, "a tree"])]
    alone = [flux.generate(**one).images[0].data for one in asked]
    hold, plan = Streamed(flux._components.transformer, SimulatedLink(), range(5)), flux._plan_for

    def streamed(one):
        return replace(one, batch=1, transformer=replace(one.transformer, placement="streamed", stay=tuple(range(5))))

    monkeypatch.setattr(flux, "plan", streamed(flux.plan))
    monkeypatch.setattr(flux, "_built", built(flux.plan))
    monkeypatch.setattr(flux, "_plan_for", lambda *asked: streamed(plan(*asked)))
    monkeypatch.setattr(flux, "_components", replace(flux._components, hold_transformer=hold))
    assert [result.images[0].data for result in flux.generate_many(asked)] == alone
    assert hold.link.copied == 2 * sum(block.size for block in hold.blocks), "four, then the last"
    need = Need("m", "standard", tiers()["regular"], load.architecture(flux.checkpoint), Work(512, 512))
    terms = Terms(need, flux.hardware, "float32", 0, "native", "sdpa", False, False)
    resident, moving = (Draft(terms, None, layout).setup for layout in (LAYOUTS[0], LAYOUTS[-1]))
    latents = [footprint.carried(setup, need.work) - footprint.texts(setup, need.work) for setup in (resident, moving)]
    assert latents[1] == 4 * latents[0]
