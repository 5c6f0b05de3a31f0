"""The budget holds: what torch's allocator gives out while a request runs is what the plan says, and never more."""

import gc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from simulated import SimulatedLink
from torch import nn
from torch.profiler import ProfilerActivity, profile

from flux2_local import BudgetError, Flux2, footprint, load, quant
from flux2_local.candidates import LAYOUTS, SYSTEM_RESERVE, Draft, Terms
from flux2_local.model.blocks import repeated
from flux2_local.model.language import Remainder
from flux2_local.offload import mapped, staged, streamed, visiting
from flux2_local.offload.staged import hold
from flux2_local.offload.streamed import Streamed
from flux2_local.offload.tensors import ALIGNMENT, hung
from flux2_local.plan import component_plan
from flux2_local.progress import Reporter
from flux2_local.text.expand import Sampling

FIELDS = {"image_size": "square", "seed": 3, "num_inference_steps": 4, "enable_safety_checker": False}
NETWORKS = ("transformer", "text_encoder", "vae")
MARGIN = 0.05
"""By which a prediction may be above what is measured."""


def peak_of(work):
    """Bytes that torch's CPU allocator gives out at most while ``work`` runs, workspaces inside operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


def with_previews(progress):
    if progress.preview is not None:
        progress.preview()


def generate(flux, **fields):
    return flux.generate("a red boat", progress=with_previews, **{**FIELDS, **fields})


def bytes_of(network):
    return sum({v.untyped_storage()._cdata: v.untyped_storage().nbytes() for _, v in hung(network)}.values())


def held(flux, names=NETWORKS):
    return sum(bytes_of(getattr(flux._components, name)) for name in names)


def planned(flux, **fields):
    fields = {**FIELDS, **fields}
    return flux._run({"prompt": "a", **fields}, Reporter())


def check(measured, predicted, slack=0):
    assert (1 - MARGIN) * predicted <= measured <= predicted + slack, measured / predicted


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dev_folder", {"acceleration": "none"}),
        ("dev_folder", {"quantize": "builtin-int8", "dtype": "float32"}),
        ("dev_folder", {"dtype": "float32", "attention": "sdpa-math"}),
        ("klein_base_folder", {"dtype": "float32"}),
    ],
)
def test_resident(model, options, request):
    flux = Flux2.load(request.getfixturevalue(model), **options)
    check(held(flux) + peak_of(lambda: generate(flux)), planned(flux).plan.peak_bytes)


def test_from_loading_on(dev_folder):
    """From files in float32 to bfloat16, so that every weight is made anew and counted."""
    loaded = []

    def work():
        loaded.append(Flux2.load(dev_folder, dtype="bfloat16"))
        generate(loaded[0])

    check(peak_of(work), planned(Flux2.load(dev_folder, dtype="bfloat16")).plan.peak_bytes)


def test_four_pictures_denoised_together(tiny):
    flux = Flux2.load("tiny", dtype="float32")
    plan = planned(flux, num_images=4).plan
    assert plan.batch == 4
    check(held(flux) + peak_of(lambda: generate(flux, num_images=4)), plan.peak_bytes)


def test_references(dev_folder):
    flux = Flux2.load(dev_folder, dtype="float32")
    noise = np.random.default_rng(0).integers(0, 256, (2, 512, 384, 3), dtype=np.uint8)
    fields = {"images": [Image.fromarray(picture) for picture in noise]}
    check(held(flux) + peak_of(lambda: generate(flux, **fields)), planned(flux, **fields).plan.peak_bytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reading_a_reference(klein_folder, dtype):
    """By itself: attention between the tokens of all pictures may take more."""
    flux = Flux2.load(klein_folder, dtype=dtype, quantize="none")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (768, 640, 3), dtype=np.uint8))
    run = planned(flux, images=[picture])
    run.report = lambda progress: None
    # Beside what is counted a few KiB of constants.
    check(
        peak_of(lambda: run.encoded([picture])), footprint.referring(draft(flux, LAYOUTS[0], 0).setup, 640, 768), 2**16
    )


def simulated(flux, layout, stay, monkeypatch, text_stay=()):
    """Networks that are not resident wait on the host; what moves is copied, as to a card."""

    def copied(value, device):
        there = value.detach().clone()
        return nn.Parameter(there, requires_grad=False) if isinstance(value, nn.Parameter) else there

    for module in (staged, streamed, visiting):
        monkeypatch.setattr(module, "moved", copied)
    c, holds = flux._components, {}
    for name in NETWORKS:
        network, blocks = getattr(c, name), {"transformer": stay, "text_encoder": text_stay}.get(name, ())
        if getattr(layout, name) == "staged":
            holds[f"hold_{name}"] = hold(network, c.device)
        elif getattr(layout, name) == "streamed":
            holds[f"hold_{name}"] = Streamed(network, SimulatedLink(), blocks)
    flux._components = replace(c, **holds)


def draft(flux, layout, limit, **fields):
    """What the planner works out for a request in a layout, whatever the device."""
    run = planned(flux, **fields)
    plan, need = run.plan, flux._need(run.request, flux.settings.acceleration)
    form = None if plan.transformer.format == plan.dtype else quant.FORMATS[plan.transformer.format]
    choices = (plan.ops, plan.attention, plan.cache is not None, plan.fold_upsampling)
    hardware = replace(
        flux.hardware, cores=torch.get_num_threads()
    )  # fewer than the machine's where tests run side by side
    return Draft(Terms(need, hardware, plan.dtype, limit, *choices), form, layout)


@pytest.mark.parametrize(
    ("layout", "quantize"),
    [*((layout, "none") for layout in LAYOUTS[1:]), (LAYOUTS[-1], "builtin-int8")],
    ids=lambda value: getattr(value, "name", value),
)
def test_weights_that_move(dev_folder, layout, quantize, monkeypatch):
    flux = Flux2.load(dev_folder, dtype="float32", quantize=quantize)
    candidate = draft(flux, layout, 0).candidate()
    simulated(flux, layout, candidate.stay, monkeypatch)
    resident = held(flux, [name for name in NETWORKS if getattr(layout, name) == "resident"])
    check(resident + peak_of(lambda: generate(flux)), candidate.peak)


def test_the_transformer_stays_for_all_pictures_of_a_request(dev_folder, monkeypatch):
    """And with it the blocks that stay; what makes the schedule's table comes before them, once."""
    flux = Flux2.load(dev_folder, dtype="float32", quantize="none")
    candidate = draft(flux, LAYOUTS[-1], 0, num_images=3).candidate()
    simulated(flux, LAYOUTS[-1], candidate.stay, monkeypatch)
    one, three = (draft(flux, LAYOUTS[0], 0, num_images=count).pixels(0) for count in (1, 3))
    assert three - one == 2 * 1024 * 32 * 4, "the others' latents"
    check(held(flux, []) + peak_of(lambda: generate(flux, num_images=3)), candidate.peak)


class Unpinned(Streamed):
    """Blocks come from where they are mapped, as expansion's do where each comes once, to a simulated device."""

    def __init__(self, network, stay):
        super().__init__(network, SimulatedLink(), stay, range(len(repeated(network))))


@pytest.mark.parametrize(
    ("layout", "limit"),
    [(LAYOUTS[0], 0), (LAYOUTS[1], 0), (LAYOUTS[1], 10**12), (LAYOUTS[2], 10**12), (LAYOUTS[3], 0)],
    ids=lambda value: getattr(value, "name", "all stay" if value else "none stay"),
)
def test_expansion(dev_folder, layout, limit, monkeypatch):
    """Beside the resident networks or alone, with the text encoder's own weights; afterwards nothing of it is left."""
    flux = Flux2.load(dev_folder, dtype="float32", quantize="none")
    fields = {"enable_prompt_expansion": True, **FIELDS}
    one = draft(flux, layout, limit, **fields)
    candidate = one.candidate()
    plan = replace(planned(flux, **fields).plan, expansion=component_plan(candidate, "m", "float32", "expansion"))
    resident = held(flux, [name for name in NETWORKS if getattr(layout, name) == "resident"])
    simulated(flux, layout, candidate.stay, monkeypatch, candidate.text_stay)
    monkeypatch.setattr(mapped, "Mapped", Unpinned)
    monkeypatch.setattr(flux, "_plan_for", lambda *_: plan)
    drawn = iter([*range(9, 15), 2] * 2)
    monkeypatch.setattr(Sampling, "draw", lambda *_: next(drawn))
    run = planned(flux, **fields)
    staying = len(candidate.text_stay), len(candidate.expansion_stay)
    streams = layout.text_encoder == "streamed", layout.name != "resident"
    assert staying == tuple(n * stays * bool(limit) for n, stays in zip((30, 2), streams, strict=True))
    predicted = one.expanding(candidate.text_stay, candidate.expansion_stay) - one.beside()
    predicted -= footprint.texts(one.setup, one.terms.need.work) + footprint.tables(
        one.setup, one.terms.need.work
    )  # of another picture
    check(resident + peak_of(run.expand), predicted)
    assert not [o for o in gc.get_objects() if type(o) is Remainder and not o.norm.weight.is_meta]
    assert resident + peak_of(lambda: generate(flux, **fields)) <= candidate.peak


@pytest.mark.parametrize("limit", [0, 10**12], ids=["none stay", "all stay"])
def test_blocks_that_stay(dev_folder, limit, monkeypatch):
    """Weights are small beside a decoded picture here, so that they are measured by themselves."""
    flux = Flux2.load(dev_folder, dtype="float32")
    one = draft(flux, next(layout for layout in LAYOUTS if layout.transformer == "streamed"), limit)
    transformer = flux._components.transformer
    with torch.inference_mode():
        mod, rotary = transformer.modulation(torch.tensor(0.5), 2.5), transformer.rotary(torch.zeros(513, 4))
        inputs = torch.zeros(1, 1, 32), transformer.context(torch.zeros(1, 512, 48)), mod, rotary, 1

    def use():
        with flux._components.hold_transformer(), torch.inference_mode():
            transformer(*inputs)

    alone = peak_of(use)
    simulated(flux, one.layout, one.stay(), monkeypatch)
    padding = ALIGNMENT * sum(
        1 for _ in transformer.parameters()
    )  # of every tensor in a block, where one a block is counted
    check(peak_of(use) - alone, one.weights("transformer").streaming(one.stay()), padding)


@pytest.mark.parametrize(
    "side",
    [1024, pytest.param(2048, marks=pytest.mark.slow)],
)
def test_the_smallest_budget_that_an_error_names_is_enough(dev_folder, side):
    """And no more than that is used, for which the picture is decoded in tiles. Not in the files' own type, in which weights would
    stay in them."""
    fields = {"image_size": {"width": side, "height": side}}
    flux = Flux2.load(dev_folder, dtype="bfloat16", quantize="none", vram=2**40)
    flux.settings = replace(flux.settings, vram=1)
    with pytest.raises(BudgetError) as caught:
        planned(flux, **fields)
    flux.settings = replace(flux.settings, vram=caught.value.smallest)
    plan = planned(flux, **fields).plan
    assert plan.vae_tile == 512 and plan.peak_bytes == caught.value.smallest - SYSTEM_RESERVE["cpu"]
    check(held(flux) + peak_of(lambda: generate(flux, **fields)), plan.peak_bytes)


def denoised(flux, setup, plan, **fields):
    """Bytes that denoising takes at most, of one picture or of all together, and what is predicted in ``setup``."""
    run = planned(flux, **fields)
    run.plan, run.report = replace(run.plan, **plan), lambda progress: None
    run.prepare()
    shots = [(run, number) for number in range(run.request.num_images)]
    given = [run.text, *([] if run.negative is None else [run.negative]), *run.latents]
    measured = sum(value.nbytes for value in given) + peak_of(lambda: run.denoise(shots, None, 0, 1))
    sizes = tuple(picture.size for picture in run.references)
    work = replace(run.plan.work, references=sizes, batch=len(shots))
    own = replace(draft(flux, LAYOUTS[0], 0, **fields).setup, arch=load.architecture(flux.checkpoint), **setup)
    return measured, footprint.denoising(own, work) + footprint.tables(own, work)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("together", [False, True])
def test_guidance_with_its_passes_together_or_apart(klein_base_folder, together, images):
    flux = Flux2.load(klein_base_folder, dtype="float32", quantize="none")
    check(*denoised(flux, {"together": together}, {"together": together}, num_images=images))


@pytest.mark.parametrize("images", [1, 2])
def test_what_is_kept_of_references(klein_kv_folder, images):
    """Small channels make it less exact: what is no longer or not yet there while references are read is counted then too."""
    flux = Flux2.load(klein_kv_folder, dtype="float32", quantize="none")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 768, 640, 3), dtype=np.uint8)
    given = [Image.fromarray(picture) for picture in pictures]
    measured, predicted = denoised(flux, {}, {}, images=given, num_images=images)
    assert 0.92 * predicted <= measured <= predicted, measured / predicted


def alive():
    """Objects that Python's collector knows, tensors among them, and the bytes of these."""
    gc.collect()
    objects = gc.get_objects()
    tensors = [o for o in objects if type(o) in (torch.Tensor, nn.Parameter)]  # not those that torch's compiler left
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return len(objects), len(tensors), sum(sizes.values())


@pytest.mark.parametrize("requests", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_requests_leave_nothing_behind(dev_folder, requests, monkeypatch):
    """Each with a prompt and a seed of its own, on a device that weights move to; the first two may fill caches."""
    flux = Flux2.load(dev_folder, dtype="float32", quantize="none")
    simulated(flux, LAYOUTS[-1], (0, 2), monkeypatch)
    counts = []
    for number in range(requests):
        flux.generate(f"boat {number}", progress=with_previews, **{**FIELDS, "seed": number})
        counts.append(alive())
    objects, tensors, sizes = zip(*counts[2:], strict=True)
    assert len(set(tensors)) == len(set(sizes)) == 1
    assert min(later - earlier for earlier, later in pairwise(objects)) <= 0, "every request left an object"
